"""Meshes: the same numbers on all, parameters where the table says, bytes read once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from fjft import sharding, tree
from fjft.checkpoint import loading, safetensors
from fjft.errors import UserError
from fjft.objectives import causal_lm
from fjft.peft import lora

CASE = "llama/llama3-rope-biases"
T = 16
MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2)]


def _mesh(data, fsdp, tensor):
    return sharding.make_mesh(sharding.Config(data=data, fsdp=fsdp, tensor=tensor))


def _loss_and_gradients(model, mesh):
    graphdef, params = tree.split(model)
    rows = sharding.batch_sharding(mesh)
    lengths = [[T], [9, 7], [5, 6, 4], [12]] * 2
    batch = jax.device_put(tiny.make_batch(lengths, T), rows)

    @jax.jit
    @jax.value_and_grad
    def mean_loss(params):
        merged = tree.merge(graphdef, params)
        sums = causal_lm.loss(merged, batch, causal_lm.Config(chunk_tokens=8))
        return sums.loss / sums.weight

    with jax.set_mesh(mesh):
        return mean_loss(params)


@pytest.fixture(scope="module")
def on_one_device(get_twins):
    mesh = sharding.single_device_mesh()
    model = tiny.build_model(get_twins(CASE).directory, mesh=mesh)
    loss, grads = _loss_and_gradients(model, mesh)
    return float(loss), {path: np.asarray(g) for path, g in grads.items()}


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_losses_and_gradients_are_the_same_on_every_mesh(
    get_twins, on_one_device, sizes
):
    mesh = _mesh(*sizes)
    model = tiny.build_model(get_twins(CASE).directory, mesh=mesh)
    loss, grads = _loss_and_gradients(model, mesh)
    expected_loss, expected_grads = on_one_device
    assert float(loss) == pytest.approx(expected_loss, rel=1e-6)
    for path, expected in expected_grads.items():
        assert tiny.relative_error(grads[path], expected) < 1e-5, path


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_parameters_lie_where_the_table_says(get_twins, sizes):
    mesh = _mesh(*sizes)
    config = lora.Config(r=4, modules_to_save="lm_head")
    model = tiny.build_model(get_twins(CASE).directory, lora, config, mesh)
    _, params = tree.split(model)
    block = "layers.blocks.0"
    _, fsdp, tensor = sizes

    def spread(size):
        """A factor that its own rule leaves whole over fsdp is cut if it divides."""
        return "tensor" if size % (tensor * fsdp) else ("tensor", "fsdp")

    q_out = params[f"{block}.attention.q.weight"].shape[1]
    down_in = params[f"{block}.mlp.down.weight"].shape[2]
    specs = {
        "embedding.weight": P("tensor", "fsdp"),
        "lm_head.weight": P("tensor", "fsdp"),
        "norm.weight": P(None),
        f"{block}.attention.q.weight": P(None, "tensor", "fsdp"),
        f"{block}.attention.k.weight": P(None, "tensor", "fsdp"),
        f"{block}.attention.q.bias": P(None, "tensor"),
        f"{block}.attention.o.weight": P(None, "fsdp", "tensor"),
        f"{block}.mlp.down.weight": P(None, "fsdp", "tensor"),
        f"{block}.mlp.gate.weight": P(None, "tensor", "fsdp"),
        f"{block}.attention.q.adapter.a": P(None, None, "fsdp"),
        f"{block}.attention.q.adapter.b": P(None, spread(q_out), None),
        f"{block}.mlp.down.adapter.a": P(None, None, spread(down_in)),
        f"{block}.mlp.down.adapter.b": P(None, "fsdp", None),
    }
    split = {None: 1, "fsdp": fsdp, "tensor": tensor}
    split["tensor", "fsdp"] = tensor * fsdp
    for path, spec in specs.items():
        param = params[path]
        assert param.sharding.spec == spec, path
        expected = [n // split[a] for n, a in zip(param.shape, spec, strict=True)]
        assert {s.data.shape for s in param.addressable_shards} == {tuple(expected)}
    assert all(len(p.sharding.device_set) == np.prod(sizes) for p in params.values())


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_byte_is_read_once_and_a_block_at_a_time(get_twins, sizes, monkeypatch):
    monkeypatch.setattr(loading, "BLOCK_BYTES", 1000)
    twin = get_twins(CASE).torch
    files = tiny.memory_files(twin)
    model = tiny.build_model(files, mesh=_mesh(*sizes))
    source = files.tensors
    assert isinstance(source, tiny.MemorySource)
    assert source.bytes_read == sum(a.nbytes for a in source.arrays.values())
    for name, shape in source.reads:
        assert np.prod(shape) * source.dtype(name).itemsize <= 1000, name
    assert tree.num_bytes(tree.split(model)[1]) == source.bytes_read
    whole = tree.split(get_twins(CASE).model)[1]
    for path, param in tree.split(model)[1].items():
        np.testing.assert_array_equal(param, whole[path], err_msg=path)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_file_is_read_once_also_where_devices_hold_strips_of_columns(
    get_twins, sizes, monkeypatch
):
    counts, read = [], safetensors.read_exactly

    def count(file, offset, buffer):
        counts.append(buffer.nbytes)
        read(file, offset, buffer)

    monkeypatch.setattr(safetensors, "read_exactly", count)
    model = tiny.build_model(get_twins(CASE).directory, mesh=_mesh(*sizes))
    assert sum(counts) == tree.num_bytes(tree.split(model)[1])


@pytest.mark.parametrize("size", [1, 20_000])
def test_a_parameter_too_large_for_the_host_comes_in_parts(
    get_twins, size, monkeypatch
):
    whole = tree.split(get_twins(CASE).model)[1]
    held, views = [], loading._views

    def spy(site, parts):
        held.append([part.nbytes for part in parts.values()])
        return views(site, parts)

    monkeypatch.setattr(loading, "_views", spy)
    monkeypatch.setattr(loading, "HOST_BYTES", size)
    monkeypatch.setattr(loading, "_share_memory", lambda sharding: False)
    model = tiny.build_model(get_twins(CASE).directory, mesh=_mesh(1, 4, 2))
    assert all(len(parts) == 1 or sum(parts) <= size for parts in held)
    assert len(held) > len(whole)
    for path, param in tree.split(model)[1].items():
        np.testing.assert_array_equal(param, whole[path], err_msg=path)


def test_an_axis_that_does_not_divide_is_refused_with_the_sizes_that_work(get_twins):
    with pytest.raises(UserError) as caught:
        tiny.build_model(get_twins(CASE).directory, mesh=_mesh(1, 1, 8))
    message = str(caught.value)
    assert message.startswith("layers.blocks.0.attention.k.bias:")
    assert "'kv_heads' of size 20" in message
    assert "mesh.tensor = 8" in message
    assert message.endswith("[1, 2, 4, 5]")


def test_an_axis_that_no_rule_covers_is_refused():
    with pytest.raises(UserError, match="no sharding rule for axis 'mystery'"):
        sharding.param_shardings(
            {"x.weight": ("mystery",)}, {"x.weight": (4,)}, _mesh(1, 1, 1)
        )


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((1, -1, 1), (1, 8, 1)), ((-1, 2, 2), (2, 2, 2)), ((1, 2, 1), (1, 2, 1))],
)
def test_one_size_may_be_the_rest(sizes, expected):
    mesh = _mesh(*sizes)
    assert tuple(mesh.shape[a] for a in ("data", "fsdp", "tensor")) == expected


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((-1, -1, 1), "one of them may be -1"),
        ((0, 1, 1), "sizes are positive"),
        ((3, -1, 1), "does not divide the 8 devices"),
        ((16, 1, 1), "needs 16 devices, this run has 8"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        _mesh(*sizes)


def test_a_batch_that_does_not_divide_names_the_nearest_that_do():
    with pytest.raises(UserError, match=r"batch 12 .* = 8; use 8 or 16"):
        sharding.check_batch(12, 2, _mesh(2, 2, 2))
    with pytest.raises(UserError, match=r"use 8$"):
        sharding.check_batch(3, 1, _mesh(8, 1, 1))
    sharding.check_batch(16, 2, _mesh(2, 2, 2))


def test_without_a_mesh_an_activation_stays_as_it_is():
    x = jnp.ones((2, 3))
    assert sharding.constrain(x, "batch", None) is x

"""The step: cut, laid out and donated as promised, with the same numbers."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny_experiment import make_config, start, take_steps

from fjft import tree
from fjft.errors import UserError

# float32 sums in another order: 1e-7 relative in a loss of one step, growing tenfold
# over a few steps of Adam. What a lost row or a wrong divisor does is a thousand times
# as much.
TOLERANCE = 1e-5
MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2)]


def numbers(metrics: list) -> np.ndarray:
    """[steps, 2]: loss and gradient norm."""
    return np.array([(m.loss_sum / m.weight_sum, m.grad_norm) for m in metrics])


@pytest.fixture(scope="module")
def reference(llama, tmp_path_factory) -> np.ndarray:
    """Five steps, one device, the batch whole."""
    config = make_config(llama, tmp_path_factory.mktemp("run"))
    return numbers(take_steps(start(config), 5)[1])


@pytest.mark.parametrize("parts", [2, 8])
def test_accumulation_changes_nothing(llama, reference, tmp_path, parts):
    config = make_config(llama, tmp_path, train__accumulation_steps=parts)
    _, metrics = take_steps(start(config), 5)
    np.testing.assert_allclose(numbers(metrics), reference, rtol=TOLERANCE)
    # The rows differ in trained tokens, or a mean of means would have passed.
    weights = [float(m.weight_sum) for m in metrics]
    assert len(set(weights)) > 1


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_meshes_give_the_same_losses(llama, reference, tmp_path, mesh):
    started = start(make_config(llama, tmp_path), mesh)
    state, metrics = take_steps(started, 5)
    np.testing.assert_allclose(numbers(metrics), reference, rtol=TOLERANCE)

    block = "layers.blocks.0."
    expected = {
        f"{block}attention.q.adapter.a": P(None, None, "fsdp"),
        f"{block}attention.q.adapter.b": P(None, ("tensor", "fsdp"), None),
        f"{block}attention.o.adapter.a": P(None, None, ("tensor", "fsdp")),
        f"{block}attention.o.adapter.b": P(None, "fsdp", None),
        f"{block}mlp.down.adapter.a": P(None, None, ("tensor", "fsdp")),
    }
    specs = {path: value.sharding.spec for path, value in state.params.items()}
    assert expected.items() <= specs.items()
    frozen = started.run.frozen
    assert frozen[f"{block}attention.q.weight"].sharding.spec == P(
        None, "tensor", "fsdp"
    )
    # Not only said to be cut: a device holds its part alone.
    held = frozen[f"{block}attention.q.weight"].addressable_shards[0].data.shape
    assert held == (3, 64 // mesh[2], 64 // mesh[1])
    for moments in moments_of(state.opt_state):
        assert {path: m.sharding.spec for path, m in moments.items()} == specs


def test_rows_in_stretches_give_the_same_losses(llama, reference, tmp_path):
    started = start(make_config(llama, tmp_path), (1, 2, 2, 2))
    state, metrics = take_steps(started, 5)
    np.testing.assert_allclose(numbers(metrics), reference, rtol=TOLERANCE)
    # Devices that share rows share the weights too.
    block = "layers.blocks.0.attention.q"
    cut = ("fsdp", "sequence")
    assert started.run.frozen[f"{block}.weight"].sharding.spec == P(None, "tensor", cut)
    assert state.params[f"{block}.adapter.a"].sharding.spec == P(None, None, cut)
    with pytest.raises(UserError, match=r"length 94 .* mesh.sequence = 4"):
        start(make_config(llama, tmp_path, data__max_length=94), (1, 1, 1, 4))


def test_what_waits_in_the_hosts_memory_changes_nothing(llama, reference, tmp_path):
    config = make_config(
        llama, tmp_path, optimizer__offload=True, model__remat="offload"
    )
    state, metrics = take_steps(start(config, (1, 2, 1)), 5)
    np.testing.assert_allclose(numbers(metrics), reference, rtol=TOLERANCE)
    for moments in moments_of(state.opt_state):
        kinds = {m.sharding.memory_kind for m in moments.values()}
        assert kinds == {"pinned_host"}


def moments_of(opt_state) -> list[dict]:
    """Adam's two dicts of moments."""
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, dict))
    found = [leaf for leaf in leaves if isinstance(leaf, dict)]
    assert len(found) == 2
    return found


@pytest.mark.parametrize("method", ["lora", "full"])
def test_state_is_donated_and_frozen_weights_are_not_returned(llama, tmp_path, method):
    config = make_config(llama, tmp_path, peft__method=method)
    started = start(config, (1, 8, 1))
    run, before = started.run, started.state
    batch = next(run.batches())
    with jax.set_mesh(started.mesh):
        lowered = run.train_step.lower(before, run.frozen, batch)
        memory = lowered.compile().memory_analysis()
        after, metrics = run.train_step(before, run.frozen, batch)
    device = started.mesh.devices.flat[0]

    def bytes_on_device(values) -> int:
        return sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves(values)
            for shard in leaf.addressable_shards
            if shard.device == device
        )

    # Every byte of the new state lies where the old one lay. The outputs' own table of
    # pointers is counted among the outputs.
    size = bytes_on_device(after)
    assert memory.alias_size_in_bytes == size
    extra = memory.output_size_in_bytes - size - bytes_on_device(metrics)
    assert 0 <= extra < 8 * (len(jax.tree.leaves((after, metrics))) + 2)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(run.frozen))
    assert bool(run.frozen) == (method == "lora")


def test_bad_step_leaves_no_trace(llama, tmp_path):
    """A NaN in the base makes loss and gradients NaN; the state must not see it."""
    started = start(make_config(llama, tmp_path))
    state, _ = take_steps(started, 2)
    before = jax.device_get(state)
    path = "layers.blocks.0.mlp.up.weight"
    frozen = started.run.frozen
    bad = frozen | {path: frozen[path].at[0, 0, 0].set(np.nan)}
    with jax.set_mesh(started.mesh):
        after, metrics = started.run.train_step(state, bad, next(started.run.batches()))
    assert not metrics.is_finite
    assert np.isnan(metrics.loss_sum)
    after = jax.device_get(after)
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, before.opt_state)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_overflowing_update_is_not_applied(llama, tmp_path):
    """The learning rate alone is infinite; loss and gradient are still good."""
    config = make_config(
        llama,
        tmp_path,
        optimizer__learning_rate=1e39,
        optimizer__schedule="constant",
        optimizer__warmup_steps=0.0,
    )
    started = start(config)
    before = jax.device_get(started.state.params)
    state, [metrics] = take_steps(started, 1)
    assert np.isfinite(metrics.loss_sum)
    assert np.isfinite(metrics.grad_norm)
    assert not metrics.is_finite
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), before)


def test_each_step_has_its_own_dropout(llama, tmp_path):
    """Two steps on one batch at rate 0 differ by dropout alone, and repeat exactly."""
    config = make_config(
        llama,
        tmp_path,
        peft__lora_dropout=0.5,
        optimizer__learning_rate=1e-30,
        optimizer__schedule="constant",
        optimizer__warmup_steps=0.0,
    )
    started = start(config)
    # B is zero at first, and would hide what happens to A's input.
    params = {
        path: jax.device_put(np.full(p.shape, 0.05, np.float32), p.sharding)
        if path.endswith("adapter.b")
        else p
        for path, p in started.state.params.items()
    }
    batch = started.run.loader.assemble(0)
    losses = []
    for _ in range(2):
        fresh = jax.tree.map(lambda x: x.copy(), started.state)
        state = dataclasses.replace(
            fresh, params=jax.tree.map(lambda x: x.copy(), params)
        )
        with jax.set_mesh(started.mesh):
            for _ in range(2):
                state, metrics = started.run.train_step(
                    state, started.run.frozen, batch
                )
                losses.append(float(metrics.loss_sum))
    assert losses[:2] == losses[2:]
    assert losses[0] != losses[1]


def test_bfloat16_compute_keeps_trained_numbers_in_float32(llama, tmp_path):
    curves = {}
    for dtype in ("float32", "bfloat16"):
        config = make_config(llama, tmp_path, model__dtype=dtype)
        started = start(config)
        frozen = {str(p.dtype) for path, p in started.run.frozen.items()}
        assert dtype in frozen
        # LoRA's scales are numbers of the method's, not weights of the base.
        assert {
            str(p.dtype)
            for path, p in started.run.frozen.items()
            if not path.endswith("adapter.scale")
        } == {dtype}
        state, metrics = take_steps(started, 20)
        assert {str(p.dtype) for p in state.params.values()} == {"float32"}
        for moments in moments_of(state.opt_state):
            assert {str(m.dtype) for m in moments.values()} == {"float32"}
        curves[dtype] = numbers(metrics)[:, 0]
    # bfloat16 has 8 bits of mantissa; a loss is a mean over some 250 tokens.
    np.testing.assert_allclose(curves["bfloat16"], curves["float32"], rtol=5e-3)
    assert not np.array_equal(curves["bfloat16"], curves["float32"])
    assert tree.count(started.run.frozen) > 0

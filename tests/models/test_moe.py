"""Routed experts: balance, mesh, and what they cost, against `transformers`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from fjft import tree
from fjft.models.moe import Load, balance_loss
from fjft.objectives import causal_lm
from fjft.sharding import Config, make_mesh

CASES = [
    "mixtral/windowed",
    "qwen2_moe/some-dense-layers",
    "qwen3_moe/every-second-normed",
]
T = 24


def make_pair(case, **changes):
    twin = tiny.make_torch(tiny.make_config(case, **changes))
    return twin, tiny.build_model(tiny.memory_files(twin))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_balance_equals_transformers(case, padded, get_twins):
    twins = get_twins(case)
    ids = tiny.random_ids(2, T)
    mask = np.ones((2, T), np.int32)
    if padded:
        mask[0, -9:] = 0
    with torch.no_grad():
        out = twins.torch(
            torch.tensor(ids).long(),
            attention_mask=torch.tensor(mask).long(),
            output_router_logits=True,
        )
    experts = twins.model.arch.experts
    assert experts is not None
    expected = load_balancing_loss_func(
        out.router_logits,
        experts.count,
        experts.per_token,
        torch.tensor(mask) if padded else None,
    )
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), ids.shape)
    _, load = twins.model.backbone_and_load(
        twins.model.embed(jnp.asarray(ids)), jnp.asarray(positions), jnp.asarray(mask)
    )
    assert float(balance_loss(load)) == pytest.approx(float(expected), rel=1e-5)


def test_even_use_costs_one_an_expert():
    even = Load(jnp.full((4,), 6.0), jnp.full((4,), 3.0), jnp.float32(12))
    assert float(balance_loss(even)) == pytest.approx(2.0)  # two experts a token
    one = Load(jnp.array([12.0, 0, 0, 0]), jnp.array([12.0, 0, 0, 0]), jnp.float32(12))
    assert float(balance_loss(one)) == pytest.approx(4.0)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_with_balance_equal_torch(case, record_property):
    twin, model = make_pair(case, output_router_logits=True, router_aux_loss_coef=0.37)
    batch = tiny.make_batch([[T], [T]], T)
    ids, labels = (torch.tensor(batch[k]).long() for k in ("input_ids", "labels"))
    out = twin(ids, labels=labels, use_cache=False)
    out.loss.backward()
    theirs = {name: p.grad for name, p in twin.named_parameters()}
    theirs = tiny.as_stored(twin, theirs)
    graphdef, params = tree.split(model)

    @jax.jit
    @jax.value_and_grad
    def mean_loss(params):
        sums = causal_lm.loss(
            tree.merge(graphdef, params),
            jax.tree.map(jnp.asarray, batch),
            causal_lm.Config(),
            rng=jax.random.key(0),
        )
        return sums.loss / sums.weight

    loss, grads = mean_loss(params)
    assert float(loss) == pytest.approx(out.loss.item(), rel=1e-5)
    worst = max(
        tiny.relative_error(grads[site.path], tiny.gather(site, theirs))
        for site in model.provenance.sites
    )
    record_property("max_relative_error", worst)
    assert worst < 1e-4


def test_the_balance_counts_in_training_alone():
    _, model = make_pair(CASES[0], output_router_logits=True, router_aux_loss_coef=0.5)
    _, without = make_pair(CASES[0], output_router_logits=False)
    assert without.balance_coefficient == 0
    batch = jax.tree.map(jnp.asarray, tiny.make_batch([[T], [9, 15]], T))

    def mean(model, rng):
        sums = causal_lm.loss(model, batch, causal_lm.Config(), rng=rng)
        return float(sums.loss / sums.weight)

    key = jax.random.key(0)
    assert mean(model, None) == pytest.approx(mean(without, None), rel=1e-6)
    assert mean(without, key) == pytest.approx(mean(without, None), rel=1e-6)
    _, load = model.backbone_and_load(
        model.embed(batch["input_ids"]), batch["positions"], batch["segment_ids"]
    )
    extra = 0.5 * float(balance_loss(load))
    assert mean(model, key) == pytest.approx(mean(model, None) + extra, rel=1e-5)


def loss_and_gradients(model):
    graphdef, params = tree.split(model)
    batch = tiny.make_batch([[T], [9, 11], [5, 7, 8], [20]] * 2, T)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return causal_lm.loss(
            tree.merge(graphdef, params),
            jax.tree.map(jnp.asarray, batch),
            causal_lm.Config(),
            rng=jax.random.key(0),
            remat="full",
        ).loss

    return loss(params)


@pytest.fixture(scope="module")
def on_one_device():
    """A model of eight experts, its loss and gradients."""
    twin = tiny.make_torch(
        tiny.make_config(
            "qwen2_moe/some-dense-layers",
            num_experts=8,
            num_experts_per_tok=3,
            num_attention_heads=8,
            output_router_logits=True,
            router_aux_loss_coef=0.3,
        )
    )
    files = tiny.memory_files(twin)
    return files, *loss_and_gradients(tiny.build_model(files))


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 1, "fsdp": 1, "expert": 8},
        {"data": 2, "fsdp": 1, "tensor": 2, "expert": 2},
        {"data": 1, "fsdp": 2, "tensor": 1, "expert": 4},
        {"data": 1, "fsdp": 2, "sequence": 2, "expert": 2},
        {"data": 1, "fsdp": 4, "tensor": 2},
    ],
)
def test_a_mesh_changes_neither_loss_nor_gradients(sizes, on_one_device):
    files, loss, grads = on_one_device
    mesh = make_mesh(Config(**sizes))
    with jax.set_mesh(mesh):
        model = tiny.build_model(files, mesh=mesh)
        gate = model.layers.blocks[0].moe.experts.gate[...]
        assert gate.sharding.spec[1] == "expert"
        local = gate.sharding.shard_shape(gate.shape)
        assert local[1] == gate.shape[1] // sizes.get("expert", 1)
        sharded_loss, sharded = loss_and_gradients(model)
    assert float(sharded_loss) == pytest.approx(float(loss), rel=1e-5)
    for path, gradient in grads.items():
        assert tiny.relative_error(sharded[path], gradient) < 1e-4, path


def test_files_hold_each_expert_by_itself(get_twins, tmp_path):
    from safetensors.numpy import load_file

    import fjft

    for case in CASES:
        twins = get_twins(case)
        fjft.save_model(twins.model, tmp_path / case)
        ours, theirs = (
            load_file(d / "model.safetensors")
            for d in (tmp_path / case, twins.directory)
        )
        assert ours.keys() == theirs.keys()
        for name, array in theirs.items():
            np.testing.assert_array_equal(ours[name], array, err_msg=name)

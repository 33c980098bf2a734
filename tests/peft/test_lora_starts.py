"""Adapters that start from the weights themselves: PiSSA, OLoRA, and DoRA's lengths."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft_twins
import pytest
import tiny
from jax.sharding import PartitionSpec as P

import fjft
from fjft import sharding, tree
from fjft.errors import UserError
from fjft.models.layers import Linear, Maker, Rngs
from fjft.objectives import causal_lm
from fjft.peft import lora, starts
from fjft.peft.lora_adapter import Adapter
from fjft.training import state as states
from fjft.training import step as steps

CASE = "llama/llama3-rope-biases"
COMMON: dict[str, Any] = {"r": 3, "lora_alpha": 7}
SOME: dict[str, Any] = {"target_modules": r".*\.(self_attn\.v_proj|mlp\.down_proj)"}
PATTERNS: dict[str, Any] = {
    "rank_pattern": {r"layers\.1\.self_attn\.v_proj": 2, "down_proj": 4},
    "alpha_pattern": {r"layers\.[02]\.mlp\.down_proj": 3},
}
# Options, which are `peft`'s too, and how near two decompositions in float32 are: the
# vectors of two singular values that lie close together are hard to tell apart.
VARIANTS = {
    "pissa-rslora": ({"init_lora_weights": "pissa", "use_rslora": True}, 1e-4),
    "dora": ({"use_dora": True}, 1e-5),
    "dora-olora-patterns": (
        {"init_lora_weights": "olora", "use_dora": True, **PATTERNS},
        1e-5,
    ),
}


@dataclasses.dataclass(frozen=True)
class Start:
    """A model of ours and of `peft`'s as they start, and how near they must be."""

    twins: tiny.Twins
    ours: Any
    theirs: Any
    config: lora.Config
    tolerance: float

    def values(self) -> dict[str, np.ndarray]:
        """Our trained parameters by PEFT's names."""
        _, params = tree.split(self.ours)
        return {
            t.name: np.asarray(params[t.path][t.index])
            for t in peft_twins.table(self.ours)
        }


@pytest.fixture(scope="module", params=VARIANTS)
def start(request, get_twins):
    options, tolerance = VARIANTS[request.param]
    twins, options = get_twins(CASE), COMMON | SOME | options
    config = lora.Config(**options)
    ours = tiny.build_model(twins.directory, lora, config)
    theirs = peft_twins.make_peft(twins.torch, **options)
    return Start(twins, ours, theirs, config, tolerance)


def test_it_starts_as_pefts(start):
    theirs = {
        name: value.detach().numpy()
        for name, value in peft_twins.trained_by_peft(start.theirs).items()
    }
    ours = start.values()
    assert {n: v.shape for n, v in ours.items()} == {
        n: v.shape for n, v in theirs.items()
    }
    for name, value in ours.items():
        if name.endswith("magnitude_vector"):
            assert tiny.relative_error(value, theirs[name]) < 1e-5
        elif start.config.has_start and name.endswith("lora_A.weight"):
            # Singular vectors have no sign of their own.
            other = name.replace("lora_A", "lora_B")
            expected = theirs[other] @ theirs[name]
            error = tiny.relative_error(ours[other] @ value, expected)
            assert error < start.tolerance, name


@pytest.mark.parametrize("start", ["pissa-rslora"], indirect=True)
def test_the_start_is_as_near_to_the_exact_one_as_float32_allows(start):
    """A stable decomposition is that of a matrix a few roundings away.

    They turn the kept directions by as much as they are larger than the gap between
    the last singular value that is kept and the first that is not (Davis and Kahan).
    """
    weights = dict(start.twins.torch.named_parameters())
    ours, rank = start.values(), start.config.r
    names = [name for name in ours if name.endswith("lora_A.weight")]
    assert names
    for a in names:
        b = a.replace("lora_A", "lora_B")
        module = a.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        weight = weights[f"{module}.weight"].detach().double().numpy()
        u, s, vh = np.linalg.svd(weight, full_matrices=False)
        exact = u[:, :rank] * s[:rank] @ vh[:rank] / start.config.scale(module)
        error = tiny.relative_error(ours[b].astype(np.float64) @ ours[a], exact)
        rounding = np.finfo(np.float32).eps * s[0]
        assert error < 4 * rounding / (s[rank - 1] - s[rank]), module


def test_it_starts_as_the_bare_model_whose_weights_it_leaves_alone(start):
    ids = tiny.random_ids(2, 16)
    error = tiny.relative_error(tiny.jit_apply(start.ours)(ids), start.twins.apply(ids))
    assert error < 1e-5
    _, params = tree.split(start.ours)
    for path, weight in tree.split(start.twins.model)[1].items():
        np.testing.assert_array_equal(params[path], weight)


def test_what_is_learned_is_written_for_the_base_as_it_was(start, tmp_path):
    """And merged into it, and loaded from it, with the same logits."""
    ours = tree.merge(*tree.split(start.ours))
    ours.provenance = start.ours.provenance
    rng = np.random.default_rng(0)
    _, params = tree.split(ours)
    new = {t.path: np.array(params[t.path]) for t in peft_twins.table(ours)}
    for t in peft_twins.table(ours):
        part = new[t.path][t.index]
        new[t.path][t.index] = part + 0.1 * rng.standard_normal(part.shape)
    tree.update(ours, {path: jnp.asarray(value) for path, value in new.items()})
    ids = tiny.random_ids(2, 16)
    logits = tiny.jit_apply(ours)(ids)
    assert tiny.relative_error(logits, start.twins.apply(ids)) > 1e-2

    fjft.save_adapter(ours, tmp_path)
    written = peft_twins.load_peft(start.twins.torch, tmp_path)
    assert tiny.relative_error(tiny.torch_logits(written, ids), logits) < 1e-5
    again = peft_twins.load(start.twins.directory, tmp_path)
    assert tiny.relative_error(tiny.jit_apply(again)(ids), logits) < 1e-5
    merged = fjft.merge_adapter(ours)
    assert tiny.relative_error(tiny.jit_apply(merged)(ids), logits) < 1e-5


def test_what_peft_wrote_with_its_start_loads_here(start, tmp_path):
    peft_twins.randomize(start.theirs)
    start.theirs.save_pretrained(tmp_path)
    ours = peft_twins.load(start.twins.directory, tmp_path)
    ids = tiny.random_ids(2, 16)
    expected = tiny.torch_logits(start.theirs, ids)
    error = tiny.relative_error(tiny.jit_apply(ours)(ids), expected)
    assert error < max(start.tolerance, 1e-5)


def test_remat_and_accumulation_change_no_step(get_twins):
    """Of the most that an adapter can be: DoRA's lengths over PiSSA's start."""
    options = COMMON | SOME | PATTERNS
    config = lora.Config(**options, init_lora_weights="pissa_niter_4", use_dora=True)
    model = tiny.build_model(get_twins(CASE).directory, lora, config)
    graphdef, params = tiny.split_bare(model)
    trained, frozen = tree.partition(params, peft_twins.is_trainable(model))
    batch = jax.tree.map(
        jnp.asarray, tiny.make_batch([[16], [7, 9], [5, 4, 6], [12]], 16)
    )
    optimizer, after = optax.sgd(1.0), []
    for remat, accumulation_steps in (("none", 1), ("full", 2)):

        def loss(model, batch, rng, remat=remat):
            return causal_lm.loss(
                model, batch, causal_lm.Config(), rng=rng, remat=remat
            )

        step = steps.make_train_step(
            graphdef,
            loss,
            optimizer,
            accumulation_steps=accumulation_steps,
            max_grad_norm=0,
        )
        state = states.init_state(trained, optimizer, 0)
        after.append(jax.jit(step)(state, frozen, batch)[0].params)
    plain, thrifty = after
    gradients = {path: trained[path] - value for path, value in plain.items()}
    largest = max(float(jnp.abs(grad).max()) for grad in gradients.values())
    assert largest > 0.01
    for path, value in plain.items():
        assert tiny.max_error(thrifty[path], value) < 1e-5 * largest, path


@pytest.mark.parametrize("start", ["dora-olora-patterns"], indirect=True)
def test_a_sharded_model_starts_the_same(start):
    mesh = sharding.make_mesh(sharding.Config(data=2, fsdp=2, tensor=2))
    spread = tiny.build_model(start.twins.directory, lora, start.config, mesh)
    _, expected = tree.split(start.ours)
    for path, value in tree.split(spread)[1].items():
        assert tiny.relative_error(value, expected[path]) < 1e-5, path
        assert value.sharding.mesh == mesh
    adapter = spread.layers.blocks[0].mlp.down.adapter
    specs = {name: p.sharding.spec for name, p in tree.split(adapter)[1].items()}
    # Both factors of a low-rank product are cut over all devices that share weights.
    assert specs["start_a"] == specs["a"] == P(None, None, ("tensor", "fsdp"))
    assert specs["magnitude"] == sharding.spec(("layers", "embed"))


def test_doras_dropout_is_of_all_that_the_gain_changes():
    """With dropout PEFT takes the map's own product once more, of what is left."""
    make = Maker(Rngs(0), jnp.float32)
    linear = Linear(make, "q", (24, 40), ("heads", "embed"), bias=True, std=1.0)
    adapter = Adapter(Rngs(1), linear, (3,), (1.5,), dropout=0.5, use_dora=True)
    adapter.start(linear, jnp.int32(3))
    assert linear.bias is not None
    assert adapter.magnitude is not None
    for number, param in enumerate((linear.bias, adapter.b, adapter.magnitude)):
        drawn = jax.random.normal(jax.random.key(number), param.shape)
        param[...] = param[...] + drawn
    x, key = jnp.ones((4, 40)), jax.random.key(2)
    kept = np.asarray(jnp.where(jax.random.bernoulli(key, 0.5, x.shape), 2 * x, 0))

    weight, bias, a, b, magnitude = (
        np.asarray(p[...], np.float64)
        for p in (linear.weight, linear.bias, adapter.a, adapter.b, adapter.magnitude)
    )
    adapted = weight + 1.5 * b @ a
    adapted *= (magnitude / np.linalg.norm(adapted, axis=1))[:, None]
    expected = np.asarray(x) @ weight.T + bias + kept @ (adapted - weight).T
    assert tiny.relative_error(adapter(linear, x, key), expected) < 1e-5


def test_the_largest_singular_values_are_found_by_iteration():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((60, 40)) @ np.diag(0.8 ** np.arange(40))
    u, s, vh = np.linalg.svd(weight)
    expected = u[:, :5] * s[:5] @ vh[:5]
    a, b = starts.factors(
        "pissa_niter_4", jnp.asarray(weight, jnp.float32), 5, jnp.float32(2)
    )
    assert tiny.relative_error(2 * b @ a, expected) < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "pizza"}, "init_lora_weights='pizza' is unknown"),
        (
            {"init_lora_weights": "pissa", "target_modules": "k_proj", "r": 21},
            "k_proj from its weight, which has 20; set peft.r",
        ),
    ],
)
def test_a_start_that_cannot_be_had_is_refused(get_twins, options, message):
    with pytest.raises(UserError, match=message):
        tiny.build_model(get_twins(CASE).directory, lora, lora.Config(**options))


def test_it_starts_from_the_values_of_a_quantized_base(get_twins):
    """With the logits of that base, and lengths and factors of what its codes mean."""
    directory = get_twins(CASE).directory
    config = lora.Config(
        **COMMON, **SOME, init_lora_weights="olora", use_dora=True, **PATTERNS
    )
    bare = tiny.build_model(directory, quantization="int8")
    ours = tiny.build_model(directory, lora, config, quantization="int8")
    ids = tiny.random_ids(2, 16)
    expected = tiny.jit_apply(bare)(ids)
    assert tiny.relative_error(tiny.jit_apply(ours)(ids), expected) < 1e-5
    down = ours.layers.blocks[0].mlp.down
    weight = np.asarray(down.weight[...], np.float32)
    lengths = np.linalg.norm(weight, axis=-1)
    assert tiny.relative_error(down.adapter.magnitude[...], lengths) < 1e-5
    rows = np.asarray(down.adapter.a[...])[0]
    basis = np.asarray(down.adapter.b[...])[0]
    assert tiny.relative_error(rows, basis.T @ weight[0]) < 1e-5

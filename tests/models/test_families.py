"""Every family against `transformers` in torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from flax import nnx
from transformers import AutoModelForCausalLM

from fjft import sharding, tree
from fjft.models.decoder import Decoder
from fjft.models.families import FAMILIES
from fjft.models.fields import Fields
from fjft.models.layers import Maker, Rngs
from fjft.models.stack import REMAT_POLICIES
from fjft.models.weights import sites
from fjft.objectives import causal_lm

B, T = 2, 24
TOLERANCE = 1e-4


def test_every_decoder_family_has_tiny_models():
    decoders = {
        name
        for name, family in FAMILIES.items()
        if isinstance(family.MODEL, type) and issubclass(family.MODEL, Decoder)
    }
    assert set(tiny.CONFIGS) == decoders


def test_logits_equal_torch(twins, record_property):
    ids = tiny.random_ids(B, T)
    error = tiny.max_error(twins.apply(ids), tiny.torch_logits(twins.torch, ids))
    record_property("max_error", error)
    assert error < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_logits_equal_torch(twins, side, record_property):
    ids = tiny.random_ids(B, T)
    mask = np.ones((B, T), np.int32)
    mask[0, slice(0, 7) if side == "left" else slice(-7, None)] = 0
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
    ours = twins.apply(ids, positions, mask)
    theirs = tiny.torch_logits(
        twins.torch, ids, attention_mask=mask, position_ids=positions
    )
    error = tiny.max_error(ours[mask == 1], theirs[mask == 1])
    record_property("max_error", error)
    assert error < TOLERANCE


def test_padding_does_not_touch_the_tokens_beside_it(twins):
    ids, mask = tiny.random_ids(1, T), np.ones((1, T), np.int32)
    mask[0, -7:] = 0
    other = np.where(mask == 1, ids, 3)
    ours, changed = (twins.apply(x, None, mask) for x in (ids, other))
    np.testing.assert_array_equal(ours[mask == 1], changed[mask == 1])
    assert np.isfinite(ours).all()


def test_packed_logits_equal_each_segment_alone(twins, record_property):
    batch = tiny.make_batch([[9, 15], [5, 7, 8]], T)
    names = ("input_ids", "positions", "segment_ids")
    ours = twins.apply(*(batch[name] for name in names))
    together = tiny.torch_logits(
        twins.torch, batch["input_ids"], position_ids=batch["positions"]
    )
    apart = np.concatenate(
        [
            tiny.torch_logits(twins.torch, part["input_ids"])[0]
            for part in tiny.unpack(batch)
        ]
    )
    real = batch["segment_ids"] > 0
    error = tiny.max_error(ours[real], apart)
    record_property("max_error", error)
    assert error < TOLERANCE
    starts = np.concatenate([x["input_ids"][0] for x in tiny.unpack(batch)])
    np.testing.assert_array_equal(starts, batch["input_ids"][real])
    # The second row ends in padding, which transformers takes for a fourth segment.
    assert tiny.max_error(ours[:, :20], together[:, :20]) < TOLERANCE


def test_cached_decoding_equals_the_full_pass(twins, record_property):
    graphdef, params = tree.split(twins.model)
    ids = tiny.random_ids(B, T)
    mask = np.ones((B, T), np.int32)
    mask[1, :4] = 0  # rows of different length are padded on the left
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0).astype(np.int32)

    @jax.jit
    def step(params, cache, ids, positions, segments):
        model = tree.merge(graphdef, params)
        x, cache = model.backbone(model.embed(ids), positions, segments, cache=cache)
        return model.unembed(x), cache

    cache, found = twins.model.init_cache(B, T + 3), []
    for start, stop in [(0, 10), *((t, t + 1) for t in range(10, T))]:
        part = (jnp.asarray(x[:, start:stop]) for x in (ids, positions, mask))
        logits, cache = step(params, cache, *part)
        found.append(np.asarray(logits))
    theirs = tiny.torch_logits(
        twins.torch, ids, attention_mask=mask, position_ids=positions
    )
    error = tiny.max_error(np.concatenate(found, 1)[mask == 1], theirs[mask == 1])
    record_property("max_error", error)
    assert error < TOLERANCE
    assert int(cache.length) == T


def test_loss_and_gradients_equal_torch(twins, record_property):
    batch = tiny.make_batch([[T], [T]], T)
    ids, labels = (torch.tensor(batch[k]).long() for k in ("input_ids", "labels"))
    # In float64, to be the more exact of the two.
    twin = tiny.cast(twins.torch, "float64")
    twin.set_experts_implementation("eager")  # torch's grouped one has no float64
    out = twin(ids, labels=labels, use_cache=False)
    out.loss.backward()
    theirs = {name: p.grad for name, p in twin.named_parameters()}
    theirs = tiny.as_stored(twin, theirs)
    # Some are zero but for rounding (transformers' softmax is float32 even here): a
    # router's where one expert's weight is scaled to 1, keys' biases without rotation.
    zero = 1e-7 * max(float(np.abs(g).max()) for g in theirs.values())

    graphdef, params = tree.split(twins.model)

    @jax.jit
    @jax.value_and_grad
    def mean_loss(params):
        model = tree.merge(graphdef, params)
        sums = causal_lm.loss(
            model, jax.tree.map(jnp.asarray, batch), causal_lm.Config()
        )
        return sums.loss / sums.weight

    loss, grads = mean_loss(params)
    assert float(loss) == pytest.approx(out.loss.item(), rel=1e-5)
    worst = 0.0
    for site in twins.model.provenance.sites:
        expected = tiny.gather(site, theirs)
        if np.abs(expected).max() < zero:
            assert np.abs(grads[site.path]).max() < zero, site.path
        else:
            worst = max(worst, tiny.relative_error(grads[site.path], expected))
        for name in site.hf_names:
            del theirs[name]
    assert not theirs
    record_property("max_relative_error", worst)
    assert worst < TOLERANCE


@pytest.mark.parametrize("case", ["qwen2/sliding-last-layers"])
def test_remat_changes_memory_not_gradients(get_twins, case):
    graphdef, params = tree.split(get_twins(case).model)
    batch = jax.tree.map(jnp.asarray, tiny.make_batch([[T], [9, 11]], T))

    def gradient(remat):
        def loss(params):
            model = tree.merge(graphdef, params)
            return causal_lm.loss(model, batch, causal_lm.Config(), remat=remat).loss

        return jax.jit(jax.grad(loss))(params)

    plain = gradient("none")
    for remat in REMAT_POLICIES:
        for path, grad in gradient(remat).items():
            assert tiny.relative_error(grad, plain[path]) < 1e-5, (remat, path)


def test_every_parameter_has_axes_that_a_rule_covers(twins):
    _, params = tree.split(twins.model)
    axes = tree.logical_axes(twins.model)
    assert axes.keys() == params.keys()
    for path, names in axes.items():
        assert len(names) == params[path].ndim, path
        assert set(names) <= set(sharding.RULES), path
        if params[path].ndim - names.count("layers") == 2:
            spread = {sharding.RULES[name] for name in names if name} - {None}
            is_thin = {"positions", "router"} & set(names)
            assert spread == ({"fsdp"} if is_thin else {"fsdp", "tensor"}), path


def test_new_weights_are_drawn_as_transformers_draws_them(twins):
    config = twins.torch.config
    family = FAMILIES[config.model_type]
    architecture = family.architecture(Fields(config))

    def make(rngs):
        maker = Maker(rngs, jnp.float32)
        return family.MODEL(architecture, maker, "float32")

    ours = jax.jit(lambda: tree.split(make(Rngs(0)))[1])()
    theirs = tiny.state_arrays(AutoModelForCausalLM.from_config(config))
    table = sites(family.rows(architecture), nnx.eval_shape(lambda: make(Rngs(0))))
    assert {site.path for site in table} == set(ours)
    for site in table:
        value, expected = np.asarray(ours[site.path]), tiny.gather(site, theirs)
        # Within five standard errors of the difference of two estimates; a constant
        # is the same constant.
        error = 5 * expected.std() * np.sqrt(2 / expected.size)
        assert abs(value.mean() - expected.mean()) <= error, site.path
        assert abs(value.std() - expected.std()) <= error, site.path


@pytest.mark.parametrize("window", [1, 2, T - 1, T, T + 1, 1000])
def test_a_window_shorter_or_longer_than_the_sequence(window):
    config = tiny.make_config("mistral/short-window", sliding_window=window)
    twin = tiny.make_torch(config)
    model = tiny.build_model(tiny.memory_files(twin))
    ids = tiny.random_ids(1, T)
    error = tiny.max_error(tiny.jit_apply(model)(ids), tiny.torch_logits(twin, ids))
    assert error < TOLERANCE


def test_bfloat16_is_as_near_to_float32_as_torch_is(twins, record_property):
    ids = tiny.random_ids(B, T)
    exact = tiny.torch_logits(twins.torch, ids)
    half = tiny.cast(twins.torch, "bfloat16")
    # Rounding sends a token here and there to another expert.
    is_routed = hasattr(twins.torch.config, "num_experts_per_tok")
    typical = np.median if is_routed else np.mean
    theirs = typical(np.abs(tiny.torch_logits(half, ids) - exact))
    model = tiny.build_model(twins.directory, dtype="bfloat16")
    logits = tiny.jit_apply(model)(ids)
    assert logits.dtype == jnp.bfloat16
    ours = typical(np.abs(logits.astype(np.float32) - exact))
    record_property("error_ours", float(ours))
    record_property("error_torch", float(theirs))
    assert ours < 1.3 * theirs

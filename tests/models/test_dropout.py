"""Dropout: what is drawn, and that every family drops what `transformers` drops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_encoders
import tiny_seq2seq
import torch

from fjft import tree
from fjft.models.attention import attention
from fjft.models.layers import dropout
from fjft.models.mask import Mask, Places

RATE = 0.3
CLASSIFIER = "bert/tanh-gelu/sequence_classification"


def test_a_share_is_dropped_and_the_mean_kept():
    y = np.asarray(dropout(jnp.ones((200, 200)), RATE, jax.random.key(0)))
    assert (y == 0).mean() == pytest.approx(RATE, abs=0.01)
    assert np.unique(y).size == 2
    assert y.mean() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("rate", "seed"), [(RATE, None), (0.0, 1)])
def test_nothing_is_dropped_without_a_rate_or_a_key(rate, seed):
    x = jnp.arange(6.0)
    rng = None if seed is None else jax.random.key(seed)
    assert dropout(x, rate, rng) is x


def test_attention_drops_probabilities_and_keeps_their_mean():
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, 5, 4, 8))
    k, v = (jax.random.normal(key, (2, 5, 2, 8)) for key in keys[1:])
    positions = jnp.broadcast_to(jnp.arange(5)[None], (2, 5))
    mask = Mask(Places(positions, jnp.ones_like(positions)), causal=True)
    plain = attention(q, k, v, mask, scale=0.3)

    @jax.jit
    @jax.vmap
    def draw(rng):
        return attention(q, k, v, mask, scale=0.3, dropout=RATE, rng=rng)

    drawn = np.asarray(draw(jax.random.split(jax.random.key(1), 4000)))
    np.testing.assert_allclose(drawn.mean(0), plain, atol=0.08)
    # The first token sees itself alone: it has it whole and scaled up, or not at all.
    first, whole = drawn[:, 0, 0, 0], np.asarray(v[0, 0, 0]) / (1 - RATE)
    is_dropped = (first == 0).all(-1)
    assert is_dropped.mean() == pytest.approx(RATE, abs=0.03)
    np.testing.assert_allclose(
        first[~is_dropped], whole[None].repeat((~is_dropped).sum(), 0), rtol=1e-5
    )
    gradient = jax.grad(
        lambda v: attention(
            q, k, v, mask, scale=0.3, dropout=RATE, rng=jax.random.key(2)
        ).sum()
    )(v)
    assert np.isfinite(gradient).all()


@pytest.fixture
def scales_alone(monkeypatch):
    """Here and in torch, what would be dropped is kept, and scaled up as the rest is.

    Outputs are then equal if, and only if, both drop the same shares at all places.
    """
    monkeypatch.setattr(
        torch.nn.functional,
        "dropout",
        lambda x, p=0.5, training=True, inplace=False: x / (1 - p) if training else x,
    )
    monkeypatch.setattr(
        jax.random, "bernoulli", lambda key, p, shape: jnp.ones(shape, bool)
    )


def _rates(config) -> dict[str, float]:
    """Another rate for each field of a config that is one."""
    names = [name for name in config.to_dict() if "dropout" in name]
    if config.model_type == "deberta-v2":
        names.append("cls_dropout")  # which its class does not declare
    return {name: 0.1 + 0.05 * i for i, name in enumerate(sorted(names))}


@pytest.mark.parametrize("case", tiny_encoders.CASES)
@pytest.mark.usefixtures("scales_alone")
def test_encoders_drop_what_torch_drops(case):
    config = tiny_encoders.make_config(case)
    config = tiny_encoders.make_config(case, **_rates(config))
    twin = tiny_encoders.make_torch(case, config).train()
    ids = tiny.random_ids(2, 12) // 2 + 8
    theirs = tiny_encoders.torch_outputs(twin, ids)
    model = tiny.build_model(tiny.memory_files(twin))
    rng = jax.random.key(0)
    with jax.disable_jit():
        hidden = model.encode(jnp.asarray(ids), None, None, None, rng=rng)
        ours = model.predict(hidden, rng=rng)
    assert tiny.max_error(ours, theirs) < 1e-4


@pytest.mark.parametrize("case", tiny_seq2seq.CASES)
@pytest.mark.usefixtures("scales_alone")
def test_encoder_decoders_drop_what_torch_drops(case):
    config = tiny_seq2seq.make_config(case)
    config = tiny_seq2seq.make_config(case, **_rates(config))
    twin = tiny_seq2seq.make_torch(config).train()
    source, target = (tiny_seq2seq.random_ids(2, n, seed=n) for n in (9, 7))
    theirs = tiny_seq2seq.torch_logits(twin, input_ids=source, decoder_input_ids=target)
    model = tiny.build_model(tiny.memory_files(twin))
    rng, places = jax.random.key(0), jnp.broadcast_to(jnp.arange(7), (2, 7))
    with jax.disable_jit():
        memory = model.encode(jnp.asarray(source), rng=rng)
        x = model.embed(jnp.asarray(target))
        ones = jnp.ones_like(places)
        x, _ = model.backbone(x, places, ones, memory=memory, rng=rng)
        ours = model.unembed(x)
    assert tiny.max_error(ours, theirs) < 1e-4


def test_each_pass_draws_anew_and_the_backward_pass_the_same_again():
    """At rates in all places: losses by key, and gradients with and without remat."""
    config = tiny_encoders.make_config(CLASSIFIER)
    config = tiny_encoders.make_config(CLASSIFIER, **_rates(config))
    twin = tiny_encoders.make_torch(CLASSIFIER, config)
    graphdef, params = tree.split(tiny.build_model(tiny.memory_files(twin)))
    ids = jnp.asarray(tiny.random_ids(2, 12) // 2 + 8)

    @functools.partial(jax.jit, static_argnames="remat")
    @jax.value_and_grad
    def loss(params, rng, remat="none"):
        model = tree.merge(graphdef, params)
        hidden = model.encode(ids, None, None, None, rng=rng, remat=remat)
        return jnp.square(model.predict(hidden, rng=rng)).sum()

    first, grads = loss(params, jax.random.key(0))
    other, _ = loss(params, jax.random.key(1))
    again, same = loss(params, jax.random.key(0), remat="full")
    assert float(first) != pytest.approx(float(other), rel=1e-3)
    assert float(first) == pytest.approx(float(again), rel=1e-6)
    largest = max(float(jnp.abs(grad).max()) for grad in grads.values())
    for path, grad in grads.items():
        # Without rounding, a bias of all keys would have no gradient.
        scale = max(float(jnp.abs(grad).max()), 1e-2 * largest)
        assert tiny.max_error(grad, same[path]) < 1e-5 * scale, path

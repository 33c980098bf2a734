"""Dropout of activations and of attention probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fjft.models.attention import attention
from fjft.models.layers import dropout
from fjft.models.mask import Mask, Places

RATE = 0.3


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

"""Picks the next token: greedily, or by temperature, top-k and top-p."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key


def sample(
    logits_BV: Float[Array, "B V"],
    rng: Key[Array, ""],
    *,
    temperature: ArrayLike,
    top_k: ArrayLike,
    top_p: ArrayLike,
) -> Int[Array, "B"]:
    """One token for each row, in float32 whatever the logits are.

    The three numbers may be traced, so that changing them compiles nothing anew; only
    the work that they ask for is done. A temperature that is Python's own 0 keeps
    drawing out of the program, which then compiles in half the time.

    Args:
      logits_BV: Logits of the next token.
      rng: The key; the draw of a row does not depend on how many rows follow it.
      temperature: Divides the logits; 0 takes the likeliest token.
      top_k: Keeps so many likeliest tokens; 0 keeps all.
      top_p: Then keeps the fewest likeliest tokens that together reach this
        probability (Holtzman et al. 2020, section 3.1); 1 keeps all.
    """
    logits_BV = logits_BV.astype(jnp.float32)

    def likeliest(logits_BV):
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    if isinstance(temperature, int | float) and temperature == 0:
        return likeliest(logits_BV)
    temperature = jnp.asarray(temperature, jnp.float32)

    def draw(logits_BV):
        scores_BV = logits_BV / temperature
        keep_BV = kept(scores_BV, top_k=top_k, top_p=top_p)
        scores_BV = jnp.where(keep_BV, scores_BV, -jnp.inf)
        return jax.random.categorical(rng, scores_BV, axis=-1).astype(jnp.int32)

    return jax.lax.cond(temperature == 0, likeliest, draw, logits_BV)


def kept(
    scores_BV: Float[Array, "B V"],
    *,
    top_k: ArrayLike,
    top_p: ArrayLike,
) -> Bool[Array, "B V"]:
    """Which tokens top-k, then top-p leave over; equal scores are kept together.

    With scores `log([.5, .3, .15, .05])`, top_p=0.6 keeps the first two: the token that
    crosses the limit stays.

    Args:
      scores_BV: Logits divided by the temperature, float32.
      top_k: 0 keeps all.
      top_p: 1 keeps all.
    """
    top_k, top_p = jnp.asarray(top_k, jnp.int32), jnp.asarray(top_p, jnp.float32)

    def by_count(keep_BV):
        return keep_BV & _fewest_likeliest(
            scores_BV, lambda some_BV: jnp.sum(some_BV, axis=-1) >= top_k
        )

    def by_probability(keep_BV):
        probs_BV = jax.nn.softmax(jnp.where(keep_BV, scores_BV, -jnp.inf), axis=-1)
        return keep_BV & _fewest_likeliest(
            scores_BV,
            lambda some_BV: jnp.sum(probs_BV, axis=-1, where=some_BV) >= top_p,
        )

    keep_BV = jnp.ones(scores_BV.shape, bool)
    limits = (top_k > 0) & (top_k < scores_BV.shape[-1])
    keep_BV = jax.lax.cond(limits, by_count, lambda keep_BV: keep_BV, keep_BV)
    return jax.lax.cond(top_p < 1, by_probability, lambda keep_BV: keep_BV, keep_BV)


def _fewest_likeliest(
    scores_BV: Float[Array, "B V"],
    enough: Callable[[Bool[Array, "B V"]], Bool[Array, "B"]],
) -> Bool[Array, "B V"]:
    """The smallest set of highest scores that is `enough`.

    Halves the interval in which the lowest kept score lies, 32 times, which is exact
    on the integers that order float32 numbers, and cheaper than sorting a vocabulary.
    """
    bits_BV = jax.lax.bitcast_convert_type(scores_BV, jnp.int32)
    # Negative floats grow towards minus infinity as integers: turn them round.
    order_BV = jnp.where(bits_BV < 0, bits_BV ^ jnp.int32(0x7FFFFFFF), bits_BV)

    def halve(_, limits):
        low_B1, high_B1 = limits  # all from low up are enough, from high up are not
        middle_B1 = (low_B1 & high_B1) + ((low_B1 ^ high_B1) >> 1)  # cannot overflow
        fits_B1 = enough(order_BV >= middle_B1)[:, None]
        return (
            jnp.where(fits_B1, middle_B1, low_B1),
            jnp.where(fits_B1, high_B1, middle_B1),
        )

    lowest_B1 = jnp.min(order_BV, axis=-1, keepdims=True)
    highest_B1 = jnp.max(order_BV, axis=-1, keepdims=True)
    low_B1, _ = jax.lax.fori_loop(0, 32, halve, (lowest_B1, highest_B1 + 1))
    return order_BV >= low_B1

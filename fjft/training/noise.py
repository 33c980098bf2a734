"""How much gradients of single rows differ (McCandlish et al. 2018, appendix A).

The expected square of a mean gradient over a batch of B is `|G|^2 + S / B`: G is the
true gradient, S the summed variance of each of its numbers over rows. A batch and the
microbatches that it is cut into are two sizes, which tell both apart. `S / |G|^2` is
the simple noise scale, in rows: far smaller batches cost steps, far larger ones gain
little. Sizes are weights here, as the loss counts them, until the end.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fjft.tree import Params


class Spread(NamedTuple):
    """What is summed over microbatches; float32 scalars.

    Attributes:
      squares: The square of each one's mean gradient.
      inverses: One divided by each one's weight.
      count: Those that have any weight.
    """

    squares: jax.Array
    inverses: jax.Array
    count: jax.Array


class Noise(NamedTuple):
    """What a batch tells of noise; float32 scalars, each too noisy by itself.

    Attributes:
      variance: S, summed over all parameters, of one row.
      square: |G|^2; may turn out negative.
    """

    variance: jax.Array
    square: jax.Array


def measure(grads: Params, weight: jax.Array) -> Spread:
    """Measures one microbatch, from its summed gradient."""
    has_weight = weight > 0
    inverse = jnp.where(has_weight, 1 / jnp.where(has_weight, weight, 1), 0)
    squares = _square(grads) * inverse**2
    return Spread(squares, inverse, has_weight.astype(jnp.float32))


def estimate(
    spread: Spread, grads: Params, weight: jax.Array, num_rows: jax.Array
) -> Noise:
    """Tells noise and gradient apart.

    Args:
      spread: Summed over a batch's microbatches.
      grads: The mean gradient of the batch.
      weight: The batch's.
      num_rows: Rows that the batch has.
    """
    count = jnp.maximum(spread.count, 1)
    gap = spread.inverses / count - 1 / weight
    # One microbatch alone is the batch.
    can_tell = spread.count > 1
    square = _square(grads)
    excess = (spread.squares / count - square) / jnp.where(can_tell, gap, 1)
    variance = jnp.where(can_tell, excess, 0)
    return Noise(variance * num_rows / weight, square - variance / weight)


def _square(grads: Params) -> jax.Array:
    squares = (jnp.sum(jnp.square(g), dtype=jnp.float32) for g in grads.values())
    return sum(squares, start=jnp.float32(0))

"""Positions that are not rotations: relative ones in buckets, and sinusoids."""

import functools
import math

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from fjft.models.layers import Maker, normal


class RelativeBias(nnx.Module):
    """A number for each head and bucket of distances (Raffel et al. 2020, 2.1)."""

    def __init__(
        self,
        make: Maker,
        num_buckets: int,
        num_heads: int,
        *,
        max_distance: int,
        bidirectional: bool,
        std: float,
    ):
        # Small, and its heads need not divide: every device has all of it.
        self.weight = make((num_buckets, num_heads), (None, None), normal(std))
        self.max_distance = max_distance
        self.bidirectional = bidirectional

    def __call__(
        self, q_positions_BT: Int[Array, "B T"], kv_positions_BS: Int[Array, "B S"]
    ) -> Float[Array, "B N T S"]:
        distance_BTS = kv_positions_BS[:, None, :] - q_positions_BT[:, :, None]
        buckets_BTS = relative_buckets(
            distance_BTS,
            num_buckets=self.weight.shape[0],
            max_distance=self.max_distance,
            bidirectional=self.bidirectional,
        )
        weight = self.weight[...].astype(jnp.float32)
        return jnp.moveaxis(weight[buckets_BTS], -1, 1)


def relative_buckets(
    distance: Int[Array, "*B"],
    *,
    num_buckets: int,
    max_distance: int,
    bidirectional: bool,
) -> Int[Array, "*B"]:
    """The bucket of each distance from query to key: exact near by, coarse far off.

    Args:
      distance: Position of the key less that of the query.
      num_buckets: Buckets in all.
      max_distance: The distance from which on all fall into the last bucket.
      bidirectional: Whether later keys have buckets of their own, half of them;
        otherwise they are taken for distance 0.
    """
    start = jnp.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        start = jnp.where(distance > 0, num_buckets, 0).astype(distance.dtype)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    # Counting the limits that a distance has reached needs no logarithm, which two
    # machines would round to different buckets.
    for limit in _bucket_limits(num_buckets, max_distance):
        start = start + (distance >= limit).astype(distance.dtype)
    return start


@functools.cache
def _bucket_limits(num_buckets: int, max_distance: int) -> tuple[int, ...]:
    """The smallest distance of each bucket but the first."""
    num_exact = num_buckets // 2
    distances = np.arange(max(max_distance, num_exact) + 1)
    with np.errstate(divide="ignore"):
        ratio = np.log(distances.astype(np.float32) / np.float32(num_exact))
    steps = ratio / np.float32(math.log(max_distance / num_exact))
    steps = np.maximum(steps * np.float32(num_buckets - num_exact), 0).astype(np.int64)
    coarse = np.minimum(num_exact + steps, num_buckets - 1)
    buckets = np.where(distances < num_exact, distances, coarse)
    return tuple(int(np.argmax(buckets >= b)) for b in range(1, int(buckets[-1]) + 1))


@functools.cache
def sinusoids(num_positions: int, size: int) -> np.ndarray:
    """Sines in the first half of each vector, cosines in the second, float32."""
    frequencies = 10000.0 ** (-2 * np.arange((size + 1) // 2) / size)
    angles = np.arange(num_positions)[:, None] * frequencies
    cosines = np.cos(angles)[:, : size // 2]
    return np.concatenate([np.sin(angles), cosines], axis=1).astype(np.float32)

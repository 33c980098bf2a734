"""Rotary position embeddings and their scalings."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fjft.errors import UserError

Frequencies = tuple[float, ...]
Rotation = tuple[Float[Array, "B T R2"], Float[Array, "B T R2"]]


@dataclasses.dataclass(frozen=True)
class Switch:
    """longrope (Ding et al. 2024): long sequences have frequencies of their own.

    Attributes:
      limit: The longest sequence that has the ordinary ones.
      frequencies: Those of longer ones.
    """

    limit: int
    frequencies: Frequencies


@dataclasses.dataclass(frozen=True)
class Stretch:
    """dynamic: the base grows with every token beyond a limit ("NTK-aware" scaling).

    Attributes:
      limit: The longest sequence that has the ordinary base.
      base: That base.
      factor: How fast it grows.
      dim: Dimensions that are rotated.
    """

    limit: int
    base: float
    factor: float
    dim: int


@dataclasses.dataclass(frozen=True)
class Rope:
    """How positions turn into angles.

    Attributes:
      frequencies: Angle per position of each pair of dimensions, R / 2 of them; the
        dimensions after the first R are not rotated.
      scale: What cosines and sines are multiplied by.
      beyond: What changes in sequences longer than a limit; None is nothing.
    """

    frequencies: Frequencies
    scale: float = 1.0
    beyond: Switch | Stretch | None = None


def from_config(
    parameters: Mapping[str, Any],
    head_dim: int,
    max_positions: int,
    *,
    partial: bool = False,
) -> Rope:
    """What the `rope_parameters` of a Hugging Face config mean.

    Every number is taken from there; none has a default but those that transformers
    itself works out when they are left out.

    Args:
      parameters: `rope_parameters`.
      head_dim: H.
      max_positions: `max_position_embeddings`.
      partial: Whether the family's attention rotates only a part of the dimensions
        when `partial_rotary_factor` says so.

    Raises:
      UserError: The rope type is not known, or a key is missing.
    """
    kinds = {
        "default": _default,
        "linear": _linear,
        "dynamic": _dynamic,
        "yarn": _yarn,
        "longrope": _longrope,
        "llama3": _llama3,
    }
    kind = parameters["rope_type"]
    if kind not in kinds:
        raise UserError(f"rope_type {kind!r} is not supported; known: {list(kinds)}")
    share = parameters.get("partial_rotary_factor", 1.0)
    if not partial and share != 1.0:
        raise UserError(
            f"rope_parameters: partial_rotary_factor={share} is not supported for this "
            "model type, which rotates all dimensions; supported: 1.0"
        )
    try:
        return kinds[kind](parameters, int(head_dim * share), max_positions)
    except KeyError as error:
        raise UserError(f"rope_parameters of type {kind!r} lack {error}") from error


def _powers(base: float, dim: int) -> np.ndarray:
    """What a position is divided by, for each pair of dimensions; float32."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.float32(base) ** exponents


def _plain(parameters: Mapping[str, Any], dim: int) -> np.ndarray:
    return np.float32(1) / _powers(parameters["rope_theta"], dim)


def _tuple(frequencies: np.ndarray) -> Frequencies:
    return tuple(map(float, frequencies.astype(np.float32)))


def _default(parameters: Mapping[str, Any], dim: int, max_positions: int) -> Rope:
    del max_positions
    return Rope(_tuple(_plain(parameters, dim)))


def _linear(parameters: Mapping[str, Any], dim: int, max_positions: int) -> Rope:
    del max_positions
    return Rope(_tuple(_plain(parameters, dim) / np.float32(parameters["factor"])))


def _dynamic(parameters: Mapping[str, Any], dim: int, max_positions: int) -> Rope:
    base, factor = float(parameters["rope_theta"]), float(parameters["factor"])
    beyond = Stretch(max_positions, base, factor, dim)
    return Rope(_tuple(_plain(parameters, dim)), beyond=beyond)


def _llama3(parameters: Mapping[str, Any], dim: int, max_positions: int) -> Rope:
    """Llama 3.1: long waves are slowed by `factor`, short ones kept, the rest mixed."""
    del max_positions
    plain = _plain(parameters, dim)
    factor = np.float32(parameters["factor"])
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    context = parameters["original_max_position_embeddings"]
    wavelength = np.float32(2 * math.pi) / plain
    smooth = (np.float32(context) / wavelength - np.float32(low)) / np.float32(
        high - low
    )
    smooth = np.clip(smooth, 0, 1)
    return Rope(_tuple((1 - smooth) * plain / factor + smooth * plain))


def _yarn(parameters: Mapping[str, Any], dim: int, max_positions: int) -> Rope:
    """Peng et al. 2023, section 3.2: as llama3, but the mix runs over dimensions.

    A pair of dimensions that turns `beta_fast` times in the original context is kept,
    one that turns `beta_slow` times is slowed by `factor`.
    """
    base, context = parameters["rope_theta"], _context(parameters)
    factor = parameters["factor"] or max_positions / context

    def dimension(turns: float) -> float:
        """The (fractional) pair that turns so often in the original context."""
        wave = math.log(context / (turns * 2 * math.pi))
        return dim * wave / (2 * math.log(base))

    first = dimension(parameters.get("beta_fast") or 32)
    last = dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = last - first if last != first else 0.001
    slowed = (np.arange(dim // 2, dtype=np.float32) - np.float32(first)) / np.float32(
        width
    )
    slowed = np.clip(slowed, 0, 1)
    plain = _plain(parameters, dim)
    mixed = plain / np.float32(factor) * slowed + plain * (1 - slowed)
    return Rope(_tuple(mixed), scale=_yarn_scale(parameters, factor))


def _yarn_scale(parameters: Mapping[str, Any], factor: float) -> float:
    """What makes up for the flatter attention in a longer context."""
    given = parameters.get("attention_factor")
    if given is not None:
        return float(given)

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    weight, all_dims = (parameters.get(k) for k in ("mscale", "mscale_all_dim"))
    return scale(weight) / scale(all_dims) if weight and all_dims else scale(1)


def _longrope(parameters: Mapping[str, Any], dim: int, max_positions: int) -> Rope:
    """Ding et al. 2024: a factor for each pair, one list for short and one for long."""
    context = _context(parameters)
    powers = _powers(parameters["rope_theta"], dim)
    short, long = (
        _tuple(np.float32(1) / (np.array(parameters[name], np.float32) * powers))
        for name in ("short_factor", "long_factor")
    )
    factor = parameters.get("factor") or max_positions / context
    scale = parameters.get("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1
    return Rope(short, float(scale), Switch(context, long))


def _context(parameters: Mapping[str, Any]) -> int:
    return parameters["original_max_position_embeddings"]


def sequence_lengths(
    segments_BT: Int[Array, "B T"],
    kv_positions_BS: Int[Array, "B S"],
    kv_segments_BS: Int[Array, "B S"],
) -> Int[Array, "B T"]:
    """For each token, how many tokens its segment has so far."""

    def row(segments_T, positions_S, kv_segments_S):
        longest = jnp.zeros(positions_S.size + 1, jnp.int32)
        return longest.at[kv_segments_S].max(positions_S + 1)[segments_T]

    return jax.vmap(row)(segments_BT, kv_positions_BS, kv_segments_BS)


def rotation(
    positions_BT: Int[Array, "B T"],
    rope: Rope,
    lengths_BT: Int[Array, "B T"] | None = None,
) -> Rotation:
    """Cosines and sines of the angles at these positions, float32.

    A rope that changes beyond a limit looks at each token's own sequence, so that a
    sequence gives the same whatever it is packed or batched with. (transformers looks
    at the longest of a batch, which is the same for a batch of one.)

    Args:
      positions_BT: Positions.
      rope: How they turn into angles.
      lengths_BT: The length of each token's sequence; needed if `rope.beyond`.
    """
    frequencies_B1R2 = jnp.array(rope.frequencies, jnp.float32).reshape(1, 1, -1)
    if rope.beyond is not None:
        assert lengths_BT is not None
        frequencies_B1R2 = _beyond(frequencies_B1R2, rope.beyond, lengths_BT[..., None])
    angles = positions_BT.astype(jnp.float32)[..., None] * frequencies_B1R2
    return jnp.cos(angles) * rope.scale, jnp.sin(angles) * rope.scale


def _beyond(
    ordinary: jax.Array, beyond: Switch | Stretch, lengths_BT1: jax.Array
) -> jax.Array:
    """The frequencies of each token, Float32[B, T, R2]."""
    if isinstance(beyond, Switch):
        long = jnp.array(beyond.frequencies, jnp.float32).reshape(1, 1, -1)
    else:
        growth = lengths_BT1.astype(jnp.float32) * (beyond.factor / beyond.limit)
        growth = jnp.maximum(growth - (beyond.factor - 1), 1)
        log_base = math.log(beyond.base) + jnp.log(growth) * (
            beyond.dim / (beyond.dim - 2)
        )
        exponents = np.arange(0, beyond.dim, 2, dtype=np.float32) / beyond.dim
        long = jnp.exp(-log_base * jnp.asarray(exponents).reshape(1, 1, -1))
    return jnp.where(lengths_BT1 > beyond.limit, long, ordinary)


def rotate(
    x_BTNH: Float[Array, "B T N H"], rotation: Rotation
) -> Float[Array, "B T N H"]:
    """Rotates the pairs (i, i + R/2), as Hugging Face's `rotate_half` pairs them."""
    cos, sin = (t[:, :, None, :] for t in rotation)
    size = 2 * cos.shape[-1]
    turned, kept = x_BTNH[..., :size], x_BTNH[..., size:]
    first, second = jnp.split(turned.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
    return jnp.concatenate([rotated.astype(x_BTNH.dtype), kept], axis=-1)

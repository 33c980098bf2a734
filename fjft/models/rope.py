"""Rotary position embeddings and their scalings."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fjft.errors import UserError

Frequencies = tuple[float, ...]


def inverse_frequencies(parameters: Mapping[str, Any], head_dim: int) -> Frequencies:
    """The angle per position of each pair of dimensions, float32, H / 2 of them.

    Args:
      parameters: `rope_parameters` of a Hugging Face config; every number is taken
        from there, none has a default.
      head_dim: H.

    Raises:
      UserError: The rope type is not known.
    """
    kinds = {"default": _default, "linear": _linear, "llama3": _llama3}
    kind = parameters["rope_type"]
    if kind not in kinds:
        raise UserError(f"rope_type {kind!r} is not supported; known: {list(kinds)}")
    return tuple(map(float, kinds[kind](parameters, head_dim)))


def _default(parameters: Mapping[str, Any], head_dim: int) -> np.ndarray:
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    theta = np.float32(parameters["rope_theta"])
    return (np.float32(1) / theta**exponents).astype(np.float32)


def _linear(parameters: Mapping[str, Any], head_dim: int) -> np.ndarray:
    return _default(parameters, head_dim) / np.float32(parameters["factor"])


def _llama3(parameters: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """Llama 3.1: long waves are slowed by `factor`, short ones kept, the rest mixed."""
    plain = _default(parameters, head_dim)
    factor = np.float32(parameters["factor"])
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    context = parameters["original_max_position_embeddings"]
    wavelength = np.float32(2 * math.pi) / plain
    smooth = (np.float32(context) / wavelength - np.float32(low)) / np.float32(
        high - low
    )
    smooth = np.clip(smooth, 0, 1)
    return (1 - smooth) * plain / factor + smooth * plain


def rotation(
    positions_BT: Int[Array, "B T"], frequencies: Frequencies
) -> tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]]:
    """Cosines and sines of the angles at these positions, float32."""
    angles = positions_BT.astype(jnp.float32)[..., None] * jnp.array(
        frequencies, jnp.float32
    ).reshape(1, 1, -1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x_BTNH: Float[Array, "B T N H"],
    rotation_BTH2: tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]],
) -> Float[Array, "B T N H"]:
    """Rotates the pairs (i, i + H/2), as Hugging Face's `rotate_half` pairs them."""
    cos, sin = (t[:, :, None, :] for t in rotation_BTH2)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
    return rotated.astype(x_BTNH.dtype)

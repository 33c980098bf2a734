"""The formats in which matrices lie as codes of a few bits, with scales to count in."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fjft.errors import UserError

# Quantiles of the normal distribution, scaled to [-1, 1], one of them 0 (QLoRA,
# appendix E); as float32 they are bitsandbytes's.
NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
NESTED_BLOCK = 256  # scales that share a scale of their own

Parts = dict[str, Any]


def _spaced(start: float, stop: float, count: int) -> np.ndarray:
    """`linspace` as torch rounds it: a float32 step, counted from either end."""
    first, last = np.float32(start), np.float32(stop)
    step = np.float64((last - first) / np.float32(count - 1))
    up = np.arange(count)
    spaced = np.where(up < count // 2, first + step * up, last - step * up[::-1])
    return spaced.astype(np.float32)


def _dynamic_map() -> np.ndarray:
    """The 256 values of the 8-bit dynamic type (Dettmers et al. 2021), in order.

    A magnitude has a decimal exponent of 0 to -6; the larger it is, the more bits are
    left for the fraction, of which each value is the middle of an interval. Besides
    these there are 0 and 1.
    """
    positive = []
    for exponent in range(7):
        edges = _spaced(0.1, 1.0, 2**exponent + 1)
        middles = (edges[:-1] + edges[1:]) / np.float32(2)
        positive.append(np.float32(10.0 ** (exponent - 6)) * middles)
    values = np.concatenate(positive)
    return np.sort(np.concatenate([-values, values, np.array([0, 1], np.float32)]))


DYNAMIC = _dynamic_map()


def _nearest(x: jax.Array, table: np.ndarray, dtype: Any) -> jax.Array:
    """The number of the nearest value of a sorted table; of two, the lower one's."""
    middles = (table[:-1] + table[1:]) / np.float32(2)
    if len(table) > 16:
        return jnp.searchsorted(middles, x).astype(dtype)
    # Comparisons with constants, which fuse with what comes before and after.
    found = jnp.zeros(x.shape, jnp.float32)
    for middle in middles:
        found += (x > middle).astype(jnp.float32)
    return found.astype(jnp.uint8).astype(dtype)


def _look_up(codes: jax.Array, table: np.ndarray) -> jax.Array:
    """`table[codes]` by selection, bit by bit.

    A gather of single numbers would be slow on a TPU and would stand between the
    matrix product and what is fused with it. The table is tied to the codes, since a
    scan would take what depends on constants alone out of its loop: each of the
    table's values as a whole matrix.
    """
    wide = codes.astype(jnp.uint8)
    _, tied = jax.lax.optimization_barrier((codes[..., :1, :1], jnp.asarray(table)))
    values = [tied[i] for i in range(len(table))]
    bit = 1
    while len(values) > 1:
        is_set = (wide & np.uint8(bit)) != 0
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [jnp.where(is_set, odd, even) for even, odd in pairs]
        bit *= 2
    return values[0]


class Measure(NamedTuple):
    """What a block's numbers are counted in, each array (blocks, out).

    Attributes:
      factors: What scales a number, less its shift, to what a code may hold.
      scales: What undoes that.
      shifts: What is added to each number of the block, or None.
    """

    factors: jax.Array
    scales: jax.Array
    shifts: jax.Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """How a matrix (out, in) is stored, turned: blocks lie along the first axis.

    A TPU's matrix product reads it so, and a scale is spread over rows at no cost.

    Attributes:
      dtype: Of the codes.
      block: Numbers of a row that share a scale; 0 is the whole row.
      measure: Finds the scales of blocks (blocks, block, out).
      encode: Scaled float32 numbers to codes.
      decode: Codes to scaled float32 numbers.
      scale_dtype: Of the scales.
      nested: Whether the scales are themselves stored at 8 bits, less their mean, each
        `NESTED_BLOCK` of them with a scale (QLoRA's double quantization).
      shifted: Whether each block has a number of its own added.
    """

    dtype: Any
    block: int
    measure: Callable[[jax.Array], Measure]
    encode: Callable[[jax.Array], jax.Array]
    decode: Callable[[jax.Array], jax.Array]
    scale_dtype: Any = jnp.float32
    nested: bool = False
    shifted: bool = False

    def parts(
        self, shape: tuple[int, ...], axes: tuple[str | None, ...]
    ) -> dict[str, tuple[tuple[int, ...], tuple[str | None, ...], Any]]:
        """Shape, logical axes and dtype of each array that a weight becomes."""
        *lead, size_out, size_in = shape
        *lead_axes, axis_out, axis_in = axes
        blocks = size_in // self.block if self.block else 1
        scales = (*lead, blocks, size_out)
        # A single scale is that of the whole row, wherever the row's parts lie.
        scale_axes = (*lead_axes, axis_in if self.block else None, axis_out)
        codes = (*lead, size_in, size_out)
        found: dict[str, Any] = {
            "codes": (codes, (*lead_axes, axis_in, axis_out), self.dtype)
        }
        if self.nested:
            groups = -(-size_out * blocks // NESTED_BLOCK)
            found["scales"] = (scales, scale_axes, jnp.uint8)
            found["nested"] = ((*lead, groups), (*lead_axes, None), jnp.float32)
            found["offset"] = (tuple(lead), tuple(lead_axes), jnp.float32)
        else:
            found["scales"] = (scales, scale_axes, self.scale_dtype)
        if self.shifted:
            found["shifts"] = (scales, scale_axes, self.scale_dtype)
        return found

    def quantize(self, weight: Float[Array, "out in"]) -> Parts:
        """Codes and scales of one matrix."""
        size_out, size_in = weight.shape
        turned = weight.T.astype(jnp.float32)
        blocks = turned.reshape(-1, self.block or size_in, size_out)
        factors, scales, shifts = self.measure(blocks)
        if shifts is not None:
            blocks = blocks - shifts[:, None]
        codes = self.encode(blocks * factors[:, None]).reshape(turned.shape)
        if self.nested:
            return {"codes": codes, **_quantize_scales(scales)}
        parts = {"codes": codes, "scales": scales.astype(self.scale_dtype)}
        if shifts is not None:
            parts["shifts"] = shifts.astype(self.scale_dtype)
        return parts

    def dequantize(self, parts: Parts) -> Float[Array, "*lead in out"]:
        """The numbers that codes and scales stand for, turned, float32."""
        codes, scales = parts["codes"], parts["scales"]
        if self.nested:
            scales = _dequantize_scales(parts)
        *lead, blocks, size_out = scales.shape
        by_block = codes.reshape(*lead, blocks, -1, size_out)
        values = self.decode(by_block) * _spread(scales, by_block)
        if self.shifted:
            values = values + _spread(parts["shifts"], by_block)
        return values.reshape(codes.shape)


def _spread(scales: jax.Array, by_block: jax.Array) -> jax.Array:
    """Each block's number at each place of the block."""
    axes = (*range(scales.ndim - 1), scales.ndim)
    return jax.lax.broadcast_in_dim(scales.astype(jnp.float32), by_block.shape, axes)


def _exact_mean(x: Float[Array, "out blocks"]) -> Float[Array, ""]:
    """The mean of numbers that are not negative, the same on every mesh.

    Sums of float32 depend on their order; those of 30-bit integers, in three parts of
    10 bits, do not.
    """
    assert x.size <= 1 << 22
    _, exponent = jnp.frexp(jnp.max(x))
    whole = jnp.ldexp(x, 30 - exponent).astype(jnp.uint32)
    mean = jnp.float32(0)
    for bits in (0, 10, 20):
        part = (whole >> np.uint32(bits)) & np.uint32(1023)
        total = jnp.sum(part, dtype=jnp.uint32)
        mean += total.astype(jnp.float32) * np.float32(2.0 ** (bits - 30) / x.size)
    return jnp.ldexp(mean, exponent)


def _quantize_scales(scales: Float[Array, "blocks out"]) -> Parts:
    """Scales at 8 bits; a group is of consecutive ones, row by row of the matrix."""
    flat = scales.T.reshape(-1)
    offset = _exact_mean(scales)
    padded = jnp.pad(flat - offset, (0, -flat.size % NESTED_BLOCK))
    groups = padded.reshape(-1, NESTED_BLOCK)
    largest = jnp.max(jnp.abs(groups), axis=-1)
    factor = jnp.where(largest > 0, 1.0 / largest, 0.0)
    codes = _nearest(groups * factor[:, None], DYNAMIC, jnp.uint8)
    return {
        "scales": codes.reshape(-1)[: flat.size].reshape(scales.T.shape).T,
        "nested": largest,
        "offset": offset,
    }


def _dequantize_scales(parts: Parts) -> Float[Array, "*lead blocks out"]:
    values = _look_up(parts["scales"], DYNAMIC)
    *lead, blocks, size_out = values.shape
    groups = parts["nested"]
    wide = (*groups.shape, NESTED_BLOCK)
    spread = jax.lax.broadcast_in_dim(groups, wide, range(groups.ndim))
    spread = spread.reshape(*lead, -1)[..., : size_out * blocks]
    spread = spread.reshape(*lead, size_out, blocks).swapaxes(-1, -2)
    offset = jnp.broadcast_to(parts["offset"].reshape(*lead, 1, 1), values.shape)
    return values * spread + offset


def _as_float(codes: jax.Array) -> jax.Array:
    return codes.astype(jnp.float32)


def _reciprocal(scales: jax.Array) -> jax.Array:
    return jnp.where(scales == 0, 0.0, 1.0 / scales)


def _symmetric(limit: float, blocks: jax.Array) -> Measure:
    """The largest magnitude is scaled to `limit`."""
    largest = jnp.max(jnp.abs(blocks), axis=1)
    factors = jnp.where(largest > 0, limit / largest, 0.0)
    return Measure(factors, largest / limit)


def _lopsided(limit: float, blocks: jax.Array) -> Measure:
    """The number of the largest magnitude is scaled to `limit`, which has its sign."""
    lowest, highest = jnp.min(blocks, axis=1), jnp.max(blocks, axis=1)
    scales = jnp.where(-lowest >= highest, lowest, highest) / limit
    return Measure(_reciprocal(scales), scales)


def _ranged(limit: float, blocks: jax.Array) -> Measure:
    """The lowest number is scaled to 0, the highest to `limit`."""
    lowest = jnp.min(blocks, axis=1)
    scales = (jnp.max(blocks, axis=1) - lowest) / limit
    return Measure(_reciprocal(scales), scales, lowest)


def _normal(**options: Any) -> Format:
    return Format(
        dtype=jnp.uint4,
        block=64,
        measure=functools.partial(_symmetric, 1.0),
        encode=lambda x: _nearest(x, NF4, jnp.uint4),
        decode=lambda codes: _look_up(codes, NF4),
        **options,
    )


def _integer(dtype: Any, measure: Callable, limit: float, **options: Any) -> Format:
    low, high = jnp.iinfo(dtype).min, jnp.iinfo(dtype).max
    return Format(
        dtype=dtype,
        measure=functools.partial(measure, limit),
        encode=lambda x: jnp.clip(jnp.round(x), low, high).astype(dtype),
        decode=_as_float,
        **options,
    )


def _of_gguf(*options: Any, scale_dtype: Any = jnp.float16, **others: Any) -> Format:
    return _integer(*options, block=32, scale_dtype=scale_dtype, **others)


# What `model.quantization` may name: NormalFloat as in bitsandbytes, with float32 or
# with 8-bit scales; integers, symmetric, with a scale for each row or each 64 numbers;
# float8 with a scale for each row; and types of GGUF files under their own names.
FORMATS: dict[str, Format] = {
    "nf4": _normal(),
    "nf4_double": _normal(nested=True),
    "int8": _integer(jnp.int8, _symmetric, 127.0, block=0),
    "int4": _integer(jnp.int4, _symmetric, 7.0, block=64),
    "fp8": Format(
        dtype=jnp.float8_e4m3fn,
        block=0,
        measure=functools.partial(_symmetric, 448.0),
        encode=lambda x: x.astype(jnp.float8_e4m3fn),
        decode=_as_float,
    ),
    "q8_0": _of_gguf(jnp.int8, _symmetric, 127.0),
    "q4_0": _of_gguf(jnp.int4, _lopsided, -8.0),
    "q4_1": _of_gguf(jnp.uint4, _ranged, 15.0, shifted=True),
    "q4_k": _of_gguf(jnp.uint4, _ranged, 15.0, shifted=True, scale_dtype=jnp.float32),
}
QUANTIZATIONS = ("", *FORMATS)


def check_divides(name: str, path: str, shape: tuple[int, ...]) -> None:
    """Checks that a weight's rows are whole blocks.

    Raises:
      UserError: They are not.
    """
    block = FORMATS[name].block
    if block and shape[-1] % block:
        rows = [key for key, form in FORMATS.items() if not form.block]
        raise UserError(
            f"{path} has {shape[-1]} inputs, which are no whole blocks of {block}, in "
            f"which {name} counts; use model.quantization={' or '.join(rows)}"
        )

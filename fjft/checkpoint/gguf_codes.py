"""Takes rows of quantized GGUF tensors apart into codes and what they count in.

Source: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.
"""

from collections.abc import Callable

import ml_dtypes
import numpy as np
from gguf.quants import Q4_K

Parts = dict[str, np.ndarray]


def _halves(packed: np.ndarray, size: int) -> np.ndarray:
    """Codes of 4 bits: of each `size` bytes first the lower bits, then the upper."""
    some = packed.reshape(*packed.shape[:-1], -1, 1, size)
    return some >> np.array([[0], [4]], np.uint8) & np.uint8(15)


def _half(blocks: np.ndarray, start: int) -> np.ndarray:
    """The float16 that begins at this byte of each block."""
    return np.ascontiguousarray(blocks[..., start : start + 2]).view(np.float16)[..., 0]


def _q8_0(blocks: np.ndarray) -> Parts:
    return {"codes": blocks[..., 2:].view(np.int8), "scales": _half(blocks, 0)}


def _q4_0(blocks: np.ndarray) -> Parts:
    codes = _halves(blocks[..., 2:], 16).astype(np.int8) - np.int8(8)
    return {"codes": codes.astype(ml_dtypes.int4), "scales": _half(blocks, 0)}


def _q4_1(blocks: np.ndarray) -> Parts:
    codes = _halves(blocks[..., 4:], 16).astype(ml_dtypes.uint4)
    return {
        "codes": codes,
        "scales": _half(blocks, 0),
        "shifts": _half(blocks, 2),
    }


def _q4_k(blocks: np.ndarray) -> Parts:
    """Blocks of 256, whose eight parts have scales and shifts of 6 bits."""
    packed = np.ascontiguousarray(blocks[..., 4:16]).reshape(-1, 12)
    scales, shifts = (
        part.reshape(*blocks.shape[:-1], 8).astype(np.float32)
        for part in Q4_K.get_scale_min(packed)
    )
    return {
        "codes": _halves(blocks[..., 16:], 32).astype(ml_dtypes.uint4),
        "scales": _half(blocks, 0).astype(np.float32)[..., None] * scales,
        "shifts": -_half(blocks, 2).astype(np.float32)[..., None] * shifts,
    }


# By type in lower case, which is also the name of the format in `models.codes`: the
# bytes of a block, and what takes blocks (rows, blocks, bytes) apart.
_READERS: dict[str, tuple[int, Callable[[np.ndarray], Parts]]] = {
    "q8_0": (34, _q8_0),
    "q4_0": (18, _q4_0),
    "q4_1": (20, _q4_1),
    "q4_k": (144, _q4_k),
}


def take_apart(kind: str, packed: np.ndarray) -> Parts:
    """Codes (rows, columns), and scales and shifts (rows, columns / 32).

    Args:
      kind: A key of `models.codes.FORMATS` that is a type of GGUF files too.
      packed: Whole rows as they lie in the file (rows, bytes).
    """
    size, read = _READERS[kind]
    rows = len(packed)
    parts = read(packed.reshape(rows, -1, size))
    return {name: part.reshape(rows, -1) for name, part in parts.items()}

"""Reads GGUF files (llama.cpp's format) under Hugging Face tensor names.

A file is: a header, metadata (config and tokenizer), a table of tensors, their data.
Quantized tensors come out as float32, a few rows at a time; nothing is memory-mapped.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import dataclasses
import io
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf.quants
import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from fjft.checkpoint.gguf_codes import Parts, take_apart
from fjft.checkpoint.gguf_header import TableRow, read_header, require
from fjft.checkpoint.gguf_names import ARCHITECTURES
from fjft.checkpoint.safetensors import (
    Bounds,
    missing_tensor,
    read_box,
    read_exactly,
    slice_bounds,
)
from fjft.errors import UserError

PLAIN_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
}
# Small enough that the temporaries of dequantization stay in the cache.
DEQUANTIZED_BLOCK = 1 << 18  # elements


class Stored(NamedTuple):
    """Where and how one tensor lies.

    `shape` is row-major, `offset` in bytes from the start of the file, `heads` the
    number of heads whose rows are interleaved (0: none are), `shift` what the stored
    values have been increased by.
    """

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    heads: int = 0
    shift: float = 0.0

    @property
    def nbytes(self) -> int:
        """Size in the file, in bytes."""
        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * block_bytes


@dataclasses.dataclass(frozen=True)
class GgufSource:
    """Tensors and metadata of one GGUF file.

    Attributes:
      path: The file.
      architecture: A key of `ARCHITECTURES`.
      metadata: The file's key-values; float32 values as their shortest decimals.
      tensors: Hugging Face name to place.
      rope_factors: The divisors of the rotary frequencies (head_dim / 2,), if any.
    """

    path: Path
    architecture: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    rope_factors: np.ndarray | None

    @property
    def names(self) -> Collection[str]:
        """Every tensor's Hugging Face name."""
        return self.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape."""
        return self._stored(name).shape

    def dtype(self, name: str) -> np.dtype:
        """The stored dtype, float32 for a quantized tensor."""
        return _dtype(self._stored(name))

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads `tensor[index]`; only the rows it needs are read and dequantized.

        Args:
          name: A tensor's Hugging Face name.
          index: One slice per axis, each with step 1.

        Returns:
          A fresh array of `dtype(name)`.

        Raises:
          UserError: No such tensor, or the file ends too early.
        """
        stored = self._stored(name)
        bounds = slice_bounds(index, stored.shape)

        def read(rows: tuple[int, int]) -> np.ndarray:
            return _read(self.path, stored, (rows, *bounds[1:]))

        if stored.heads:
            return _put_in_order(stored, bounds[0], read)
        box = _read(self.path, stored, bounds)
        return box - box.dtype.type(stored.shift) if stored.shift else box

    def kind(self, name: str) -> str:
        """The stored type, as llama.cpp names it, in lower case."""
        return self._stored(name).kind.name.lower()

    def read_codes(self, name: str, rows: slice) -> Parts:
        """Reads rows of a quantized matrix as they lie in the file.

        Args:
          name: The Hugging Face name of a tensor of a kind that `models.codes` knows.
          rows: Which rows, with step 1.

        Returns:
          Codes (rows, columns), scales and shifts (rows, blocks), fresh arrays.

        Raises:
          UserError: No such tensor, or the file ends too early.
        """
        stored = self._stored(name)
        row_bytes = stored.nbytes // stored.shape[0]

        def read(rows: tuple[int, int]) -> np.ndarray:
            packed = np.empty((rows[1] - rows[0], row_bytes), np.uint8)
            with open(self.path, "rb", buffering=0) as file:
                read_exactly(file, stored.offset + rows[0] * row_bytes, packed)
            return packed

        (bounds,) = slice_bounds((rows,), stored.shape[:1])
        packed = _put_in_order(stored, bounds, read) if stored.heads else read(bounds)
        return take_apart(self.kind(name), packed)

    def require(self, key: str) -> Any:
        """The value of `<architecture>.key`, without which there is no model."""
        return require(self.path, self.metadata, f"{self.architecture}.{key}")

    def optional(self, key: str) -> Any:
        """The value of `<architecture>.key`, None where the file does not say."""
        full = f"{self.architecture}.{key}"
        return self.require(key) if full in self.metadata else None

    def _stored(self, name: str) -> Stored:
        if name not in self.tensors:
            raise missing_tensor(name, self.tensors)
        return self.tensors[name]


def open_gguf(path: Path) -> GgufSource:
    """Opens a GGUF file: reads its metadata and its table of tensors.

    Raises:
      UserError: Not a GGUF file, cut short, or with an architecture, a tensor or a
        quantization type that is not read.
    """
    metadata, table, data_start = read_header(path)
    if metadata.get("split.count", 0) > 1:
        raise UserError(
            f"{path} is one of {metadata['split.count']} parts; join them with "
            f"`llama-gguf-split --merge`"
        )
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise UserError(
            f"{path} holds architecture {name!r}; from GGUF these are read: "
            f"{', '.join(ARCHITECTURES)}"
        )
    tensors = {row.name: _place(path, row, data_start) for row in table}
    ends = [stored.offset + stored.nbytes for stored in tensors.values()]
    if max(ends, default=0) > path.stat().st_size:
        raise UserError(
            f"{path} is cut short: it has {path.stat().st_size:,} bytes and its header "
            f"promises {max(ends):,}; fetch it again"
        )
    # A table of divisors, not a weight: the config says the same in other words.
    factors = tensors.pop("rope_freqs.weight", None)
    return GgufSource(
        path,
        name,
        metadata,
        _rename(path, name, metadata, tensors),
        factors and _read(path, factors, ((0, factors.shape[0]),)),
    )


def _rename(
    path: Path, architecture: str, metadata: dict, tensors: dict[str, Stored]
) -> dict[str, Stored]:
    known = ARCHITECTURES[architecture]
    counts = _head_counts(path, architecture, metadata) if known.permuted else (0, 0)
    renamed = {}
    for key, stored in tensors.items():
        name = known.hf_name(key)
        if name is None:
            raise UserError(
                f"{path} holds a tensor {key!r} that architecture {architecture!r} is "
                f"not known to have; this variant is not read"
            )
        heads = known.heads(name, *counts)
        if heads and stored.shape[0] % (2 * heads):
            raise UserError(
                f"{path}: the {stored.shape[0]} rows of {key!r} do not divide into "
                f"{heads} heads of even size; convert the file again"
            )
        renamed[name] = stored._replace(heads=heads, shift=known.shift(name))
    return renamed


def _head_counts(path: Path, architecture: str, metadata: dict) -> tuple[int, int]:
    heads = require(path, metadata, f"{architecture}.attention.head_count")
    key = f"{architecture}.attention.head_count_kv"
    # By the format, absent means one key and value head per query head.
    return heads, require(path, metadata, key) if key in metadata else heads


def _place(path: Path, row: TableRow, data_start: int) -> Stored:
    kinds = {int(one): one for one in GGMLQuantizationType}
    kind = kinds.get(row.kind)
    if kind is None or not _is_readable(kind):
        readable = ", ".join(one.name for one in kinds.values() if _is_readable(one))
        found = f"number {row.kind}" if kind is None else kind.name
        raise UserError(
            f"{path}: tensor {row.name!r} has type {found}, which is not read; "
            f"the types that are: {readable}"
        )
    # The format counts axes from the fastest one.
    return Stored(kind, tuple(reversed(row.dims)), data_start + row.offset)


def _is_readable(kind: GGMLQuantizationType) -> bool:
    return kind.name in PLAIN_DTYPES or hasattr(gguf.quants, kind.name)


def _dtype(stored: Stored) -> np.dtype:
    return PLAIN_DTYPES.get(stored.kind.name, np.dtype(np.float32))


def _put_in_order(
    stored: Stored, rows: tuple[int, int], read: Callable[[tuple[int, int]], np.ndarray]
) -> np.ndarray:
    """Rows in Hugging Face's order; `read` reads them in the file's.

    They move only inside their head, so the heads that they lie in are read.
    """
    (start, stop), size = rows, stored.shape[0] // stored.heads
    first, last = start // size, max(start // size, -(-stop // size))
    box = read((first * size, last * size))
    pairs = box.reshape(last - first, size // 2, 2, *box.shape[1:])
    ordered = pairs.swapaxes(1, 2).reshape(box.shape)
    return ordered[start - first * size : stop - first * size]


def _read(path: Path, stored: Stored, bounds: Bounds) -> np.ndarray:
    box = np.empty([stop - start for start, stop in bounds], _dtype(stored))
    with open(path, "rb", buffering=0) as file:
        if stored.kind.name in PLAIN_DTYPES:
            read_box(file, stored.offset, box, stored.shape, bounds)
        else:
            _dequantize(file, stored, box, bounds)
    return box


def _dequantize(
    file: io.FileIO, stored: Stored, box: np.ndarray, bounds: Bounds
) -> None:
    """Fills `box` with `bounds` of a quantized tensor, a block of rows at a time."""
    if len(stored.shape) != 2:
        raise UserError(
            f"{file.name}: a quantized tensor of shape {stored.shape} is not read; "
            f"only matrices are"
        )
    quant = getattr(gguf.quants, stored.kind.name)
    quant.init_grid()
    rows, columns = stored.shape
    row_bytes = stored.nbytes // rows
    (start, stop), cut = bounds[0], slice(*bounds[1])
    block = max(1, DEQUANTIZED_BLOCK // columns)
    packed = np.empty((min(block, stop - start), row_bytes), np.uint8)
    for row in range(start, stop, block):
        some = packed[: min(block, stop - row)]
        read_exactly(file, stored.offset + row * row_bytes, some)
        box[row - start : row - start + len(some)] = quant.dequantize_rows(some)[:, cut]

"""Reads safetensors files slice by slice, in bounded memory.

The format: eight bytes with the header's length (little endian), a JSON header that
gives each tensor's dtype, shape and byte range, then the bytes, row-major and without
holes. Nothing is memory-mapped: mapped pages count as host memory once touched.

Source: https://github.com/huggingface/safetensors, section "Format".
"""

import dataclasses
import difflib
import io
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from fjft.errors import UserError

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
BLOCK_BYTES = 8 << 20  # scratch of a read whose rows are cut
GAP_BYTES = 16 << 10  # a smaller gap is cheaper to read than to seek over
READ_BYTES = 1 << 30  # Linux moves at most 2 GiB in one call

Bounds = tuple[tuple[int, int], ...]


class Stored(NamedTuple):
    """Where one tensor lies: `offset` counts bytes from the start of the file."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


@dataclasses.dataclass(frozen=True)
class SafetensorsSource:
    """Tensors of one or several safetensors files, read slice by slice."""

    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str]

    @property
    def names(self) -> Collection[str]:
        """Every tensor's name."""
        return self.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape."""
        return self._stored(name).shape

    def dtype(self, name: str) -> np.dtype:
        """The stored dtype (`ml_dtypes.bfloat16` for BF16)."""
        return self._stored(name).dtype

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads `tensor[index]`, touching only the bytes it needs.

        Args:
          name: A tensor's name.
          index: One slice per axis, each with step 1; `slice(None)` is the whole axis.

        Returns:
          A fresh array in the stored dtype. Beyond it, at most `BLOCK_BYTES` are held.

        Raises:
          UserError: No such tensor, or the file ends too early.
        """
        stored = self._stored(name)
        bounds = slice_bounds(index, stored.shape)
        box = np.empty([stop - start for start, stop in bounds], stored.dtype)
        # A handle of its own makes concurrent reads safe; unbuffered, for no copies.
        with open(stored.path, "rb", buffering=0) as file:
            read_box(file, stored.offset, box, stored.shape, bounds)
        return box

    def _stored(self, name: str) -> Stored:
        if name not in self.tensors:
            raise missing_tensor(name, self.tensors)
        return self.tensors[name]


def missing_tensor(name: str, names: Iterable[str]) -> UserError:
    """The error for a name that a checkpoint does not hold."""
    near = difflib.get_close_matches(name, list(names), n=3)
    hint = f"; the nearest names are {', '.join(near)}" if near else ""
    return UserError(f"the checkpoint has no tensor {name!r}{hint}")


def slice_bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    """Turns slices into (start, stop) per axis; start <= stop.

    Raises:
      ValueError: Not one slice per axis, or a step other than 1.
    """
    if len(index) != len(shape):
        raise ValueError(f"index {index} has not one slice per axis of {shape}")
    if any(piece.step not in (None, 1) for piece in index):
        raise ValueError(f"index {index} has a step; only step 1 is read")
    spans = [piece.indices(size) for piece, size in zip(index, shape, strict=True)]
    return tuple((start, max(start, stop)) for start, stop, _ in spans)


def open_safetensors(path: Path) -> SafetensorsSource:
    """Opens a .safetensors file, or a directory with one or an index of many.

    Only headers are read.

    Raises:
      UserError: Nothing to read, a shard missing, or a file corrupt or cut short.
    """
    if path.is_dir():
        # The order that transformers follows: a whole file hides an index beside it.
        if (path / SINGLE_NAME).is_file():
            return open_safetensors(path / SINGLE_NAME)
        if (path / INDEX_NAME).is_file():
            return _open_index(path / INDEX_NAME)
        files = sorted(path.glob("*.safetensors"))
        if len(files) == 1:
            return open_safetensors(files[0])
        raise UserError(_nothing_to_read(path, files))
    if path.name.endswith(".index.json"):
        return _open_index(path)
    return SafetensorsSource(*read_header(path))


def _nothing_to_read(directory: Path, files: list[Path]) -> str:
    if files:
        names = ", ".join(file.name for file in files)
        return (
            f"{directory} holds {names} but no {INDEX_NAME}; "
            f"name one of the files, or add the index"
        )
    old = [*directory.glob("*.bin"), *directory.glob("*.pth"), *directory.glob("*.h5")]
    found = f" (found {old[0].name}, which is not read)" if old else ""
    return (
        f"{directory} holds no weights in a format that is read{found}: only "
        f"safetensors, GGUF and pytorch_model.bin are; convert with transformers' "
        f"save_pretrained"
    )


def _open_index(path: Path) -> SafetensorsSource:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a safetensors index ({error!r}); fetch it again"
        ) from error
    missing = [shard for shard in shards if not (path.parent / shard).is_file()]
    if missing:
        raise UserError(
            f"{path.parent} lacks {len(missing)} of the {len(shards)} shards its index "
            f"names ({missing[0]} first); fetch the missing files"
        )
    headers = {shard: read_header(path.parent / shard) for shard in shards}
    for name, shard in weight_map.items():
        if name not in headers[shard][0]:
            raise UserError(
                f"{path.name} says that {name!r} is in {shard}, which does not hold "
                f"it; fetch both files again, from the same revision"
            )
    return SafetensorsSource(
        {name: headers[shard][0][name] for name, shard in weight_map.items()},
        headers[shards[0]][1] if shards else {},
    )


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Reads one file's header and checks it against the file's size.

    Returns:
      Name to place for every tensor, and the file's metadata strings.

    Raises:
      UserError: No such file, a corrupt header, an unknown dtype, or a file cut short.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            text = file.read(length) if length <= MAX_HEADER_BYTES else b""
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if head == b"version ":
        raise UserError(
            f"{path} is a git-lfs pointer, not the weights; run `git lfs pull`"
        )
    if len(head) == 8 and len(text) < length <= MAX_HEADER_BYTES:
        raise _truncated(path, size, 8 + length)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        tensors = {
            name: _parse_entry(path, name, entry, 8 + length)
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} is not a safetensors file: its header is corrupt ({error}); "
            f"fetch it again"
        ) from error
    ends = [place.offset + _nbytes(place) for place in tensors.values()]
    if max(ends, default=0) > size:
        raise _truncated(path, size, max(ends))
    return tensors, metadata


def _parse_entry(path: Path, name: str, entry: dict, data_start: int) -> Stored:
    if entry["dtype"] not in DTYPES:
        raise UserError(
            f"{path}: tensor {name!r} has dtype {entry['dtype']!r}, which is not read; "
            f"the dtypes that are: {', '.join(DTYPES)}"
        )
    shape = tuple(int(size) for size in entry["shape"])
    start, stop = entry["data_offsets"]
    stored = Stored(path, DTYPES[entry["dtype"]], shape, data_start + start)
    if start < 0 or min(shape, default=0) < 0 or stop - start != _nbytes(stored):
        raise ValueError(f"{name!r} of shape {shape} lies in bytes {start}..{stop}")
    return stored


def _nbytes(stored: Stored) -> int:
    return math.prod(stored.shape) * stored.dtype.itemsize


def _truncated(path: Path, size: int, expected: int) -> UserError:
    return UserError(
        f"{path} is cut short: it has {size:,} bytes and its header promises "
        f"{expected:,}; fetch it again"
    )


def read_box(
    file: io.FileIO, offset: int, box: np.ndarray, shape: Sequence[int], bounds: Bounds
) -> None:
    """Fills `box` with a part of a tensor of plain numbers, of any number of axes.

    Args:
      file: Opened unbuffered.
      offset: Where the whole tensor starts, in bytes.
      box: C-contiguous, of the stored dtype, of the size of `bounds`.
      shape: The whole tensor's shape.
      bounds: The part, from `slice_bounds`.

    Raises:
      UserError: The file ends first.
    """
    if not box.size:
        return
    inner_shape, inner_bounds = shape[1:], bounds[1:]
    row_bytes = math.prod(inner_shape) * box.dtype.itemsize
    whole_rows = inner_bounds == tuple((0, size) for size in inner_shape)
    if whole_rows:
        start = bounds[0][0] if bounds else 0
        read_exactly(file, offset + start * row_bytes, box)
        return
    (start, stop), wanted_bytes = bounds[0], box[0].nbytes
    if row_bytes - wanted_bytes >= GAP_BYTES or row_bytes > BLOCK_BYTES:
        for row in range(start, stop):
            place = offset + row * row_bytes
            read_box(file, place, box[row - start], inner_shape, inner_bounds)
        return
    block = min(stop - start, max(1, BLOCK_BYTES // row_bytes))
    scratch = np.empty((block, *inner_shape), box.dtype)
    cut = tuple(slice(*span) for span in inner_bounds)
    for row in range(start, stop, block):
        rows = scratch[: min(block, stop - row)]
        read_exactly(file, offset + row * row_bytes, rows)
        box[row - start : row - start + len(rows)] = rows[(slice(None), *cut)]


def read_exactly(file: io.FileIO, offset: int, buffer: np.ndarray) -> None:
    """Fills a C-contiguous array with the file's bytes from `offset` on.

    Raises:
      UserError: The file ends first (it shrank since its header was read).
    """
    view = buffer.reshape(-1).view(np.uint8).data
    file.seek(offset)
    while len(view):
        count = file.readinto(view[:READ_BYTES])
        if not count:
            raise UserError(f"{file.name} ends inside a tensor; fetch it again")
        view = view[count:]

"""Reads torch's `.bin` checkpoints, slice by slice, without torch.

Two formats are read: the zip that torch writes since 1.6, and the stream of pickles
before it. Either has a pickle that says which tensors there are, and their bytes.
Source: `torch/serialization.py`.
"""

import dataclasses
import json
import math
import tarfile
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from fjft.checkpoint.safetensors import (
    missing_tensor,
    read_box,
    read_exactly,
    slice_bounds,
)
from fjft.checkpoint.torch_pickle import Tensor, unpickle
from fjft.errors import UserError

INDEX_NAME = "pytorch_model.bin.index.json"


SINGLE_NAME = "pytorch_model.bin"


MAX_PICKLE_BYTES = 100_000_000


_STREAM_MAGIC = 0x1950A86A20F9469CFC6C


_STREAM_VERSION = 1001


class Stored(NamedTuple):
    """Where one tensor lies: `offset` counts bytes from the start of the file."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


@dataclasses.dataclass(frozen=True)
class TorchSource:
    """Tensors of one or several `.bin` files, read slice by slice."""

    tensors: Mapping[str, Stored]

    @property
    def names(self) -> Collection[str]:
        """Every tensor's name."""
        return self.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape."""
        return self._stored(name).shape

    def dtype(self, name: str) -> np.dtype:
        """The stored dtype."""
        return self._stored(name).dtype

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads `tensor[index]`.

        A row-major tensor costs the bytes of the part; any other (a transposed matrix)
        those from the part's first element to its last.

        Raises:
          UserError: No such tensor, or the file ends too early.
        """
        stored = self._stored(name)
        bounds = slice_bounds(index, stored.shape)
        sizes = [stop - start for start, stop in bounds]
        with open(stored.path, "rb", buffering=0) as file:
            if stored.strides == _row_major(stored.shape):
                box = np.empty(sizes, stored.dtype)
                read_box(file, stored.offset, box, stored.shape, bounds)
                return box
            if not math.prod(sizes):
                return np.empty(sizes, stored.dtype)
            ends = zip(bounds, stored.strides, strict=True)
            first = sum(start * stride for (start, _), stride in ends)
            reach = sum((n - 1) * s for n, s in zip(sizes, stored.strides, strict=True))
            window = np.empty(reach + 1, stored.dtype)
            itemsize = stored.dtype.itemsize
            read_exactly(file, stored.offset + first * itemsize, window)
        byte_strides = [stride * itemsize for stride in stored.strides]
        part = np.lib.stride_tricks.as_strided(window, sizes, byte_strides)
        return np.ascontiguousarray(part)

    def _stored(self, name: str) -> Stored:
        if name not in self.tensors:
            raise missing_tensor(name, self.tensors)
        return self.tensors[name]


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def find_bin(directory: Path) -> Path | None:
    """The `.bin` checkpoint in a directory: the whole file, or the index of many."""
    for name in (SINGLE_NAME, INDEX_NAME):
        if (directory / name).is_file():
            return directory / name
    return None


def open_bin(path: Path) -> TorchSource:
    """Opens a `.bin` file, or an index of many.

    Only what says where the tensors lie is read.

    Raises:
      UserError: The file is missing, corrupt, of a format that is not read, or asks to
        run something.
    """
    if path.name.endswith(".index.json"):
        return _open_index(path)
    return TorchSource(_read_file(path))


def _open_index(path: Path) -> TorchSource:
    try:
        weight_map: dict[str, str] = json.loads(path.read_text("utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no index ({error!r}); fetch it again") from error
    found: dict[str, Stored] = {}
    for shard in shards:
        if not (path.parent / shard).is_file():
            raise UserError(
                f"{path.parent} lacks {shard}, which its index names; fetch it"
            )
        found |= _read_file(path.parent / shard)
    missing = sorted(set(weight_map) - set(found))
    if missing:
        raise UserError(
            f"{path.name} names {missing[0]!r}, which no shard holds; fetch all files "
            "again, from the same revision"
        )
    return TorchSource({name: found[name] for name in weight_map})


def _read_file(path: Path) -> dict[str, Stored]:
    try:
        with open(path, "rb") as file:
            if zipfile.is_zipfile(file):
                file.seek(0)
                tensors, places = _read_zip(path, file)
            elif tarfile.is_tarfile(path):
                raise UserError(
                    f"{path} is of the tar format of torch before 0.4, which is not "
                    "read; load it with torch and save it again"
                )
            else:
                file.seek(0)
                tensors, places = _read_stream(path, file)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return {n: _place(path, n, t, places) for n, t in tensors.items()}


def _place(
    path: Path, name: str, tensor: Tensor, places: Mapping[str, tuple[int, int]]
) -> Stored:
    """Checks that a tensor lies within its storage, and that within the file."""
    storage, offset, shape, strides = tensor
    if storage.key not in places:
        raise _corrupt(path, f"{name!r} has no storage {storage.key!r}")
    start, num_bytes = places[storage.key]
    itemsize = storage.dtype.itemsize
    reach = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    last = reach if math.prod(shape) else -1
    if min((*shape, *strides, offset), default=0) < 0 or (
        (last + 1) * itemsize > num_bytes
    ):
        raise _corrupt(path, f"{name!r} reaches beyond its storage")
    return Stored(path, storage.dtype, shape, strides, start + offset * itemsize)


def _corrupt(path: Path, what: str) -> UserError:
    return UserError(f"{path} is corrupt: {what}; fetch it again")


def _read_zip(
    path: Path, file: BinaryIO
) -> tuple[dict[str, Tensor], dict[str, tuple[int, int]]]:
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        pickles = [n for n in entries if n.endswith("/data.pkl") and n.count("/") == 1]
        if len(pickles) != 1:
            raise UserError(
                f"{path} is a zip, but no checkpoint of torch: it has no data.pkl"
            )
        root = pickles[0].removesuffix("data.pkl")
        order = entries.get(f"{root}byteorder")
        if order is not None and archive.read(order).strip() == b"big":
            raise UserError(
                f"{path} was written on a big-endian machine, which is not read; load "
                "it with torch and save it again"
            )
        if entries[pickles[0]].file_size > MAX_PICKLE_BYTES:
            raise _corrupt(path, "its pickle is too large")
        with archive.open(pickles[0]) as stream:
            tensors = _tensors(path, unpickle(path, stream))
    places = {}
    for key in {tensor.storage.key for tensor in tensors.values()}:
        entry = entries.get(f"{root}data/{key}")
        if entry is not None:
            if entry.compress_type != zipfile.ZIP_STORED:
                raise UserError(
                    f"{path} is compressed, which is not read; load it with torch and "
                    "save it again"
                )
            places[key] = _payload(file, entry), entry.file_size
    return tensors, places


def _payload(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes start: after a header of two varying parts."""
    file.seek(entry.header_offset + 26)
    lengths = file.read(4)
    name, extra = (int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
    return entry.header_offset + 30 + name + extra


def _read_stream(
    path: Path, file: BinaryIO
) -> tuple[dict[str, Tensor], dict[str, tuple[int, int]]]:
    magic, version, system = (unpickle(path, file) for _ in range(3))
    if magic != _STREAM_MAGIC or version != _STREAM_VERSION:
        raise UserError(f"{path} is no checkpoint of torch")
    if not isinstance(system, dict) or not system.get("little_endian", False):
        raise UserError(
            f"{path} was written on a big-endian machine, which is not read; load it "
            "with torch and save it again"
        )
    tensors = _tensors(path, unpickle(path, file))
    dtypes = {t.storage.key: t.storage.dtype for t in tensors.values()}
    keys = unpickle(path, file)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise _corrupt(path, "it has no list of storages")
    end = path.stat().st_size
    places, offset = {}, file.tell()
    for key in keys:
        if key not in dtypes:
            raise _corrupt(path, f"no tensor uses its storage {key!r}")
        file.seek(offset)
        num_bytes = int.from_bytes(file.read(8), "little") * dtypes[key].itemsize
        offset += 8
        if offset + num_bytes > end:
            raise UserError(f"{path} is cut short; fetch it again")
        places[key] = offset, num_bytes
        offset += num_bytes
    return tensors, places


def _tensors(path: Path, content: Any) -> dict[str, Tensor]:
    """The tensors of a state dict, with what torch keeps besides left out."""
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no state dict, but a {type(content).__name__}")
    found = {k: v for k, v in content.items() if isinstance(v, Tensor)}
    if not found or not all(isinstance(name, str) for name in found):
        raise UserError(
            f"{path} holds no tensors at its top; save the model's state_dict()"
        )
    return found

"""Writes safetensors files tensor by tensor, whole or not at all.

Every header is known before the first byte of data, so only the tensor being written
is in memory. Files are written under a temporary name, synced, then renamed. Of several
processes the first one writes; the others bring their parts of the tensors.
"""

import errno
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fjft.checkpoint.safetensors import DTYPES, INDEX_NAME, SINGLE_NAME
from fjft.distributed import is_first
from fjft.errors import UserError

PT_METADATA = {"format": "pt"}


class OutTensor(NamedTuple):
    """One tensor to write; `produce` is called once, when its turn comes.

    It returns the array, or an iterable of arrays whose bytes one after another are
    the tensor (pieces along the leading axis).
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    produce: Callable[[], Any]

    @property
    def nbytes(self) -> int:
        """Size in the file, in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def write_safetensors(
    path: Path,
    tensors: Iterable[OutTensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes one file, one tensor at a time; the file appears whole or not at all.

    Tensors of wide dtypes go first, otherwise in the given order, so that each lies at
    a multiple of its item size.

    Args:
      path: The file; its directory exists.
      tensors: What to write; no name twice.
      metadata: The header's strings; `{"format": "pt"}` when not given, without which
        transformers refuses the file.

    Raises:
      UserError: No space left, or the place is not writable.
      ValueError: A tensor came out with another dtype or size than announced.
    """
    listed = list(tensors)
    needed = sum(tensor.nbytes for tensor in listed)
    write_whole(Path(path), needed, _content(listed, metadata or PT_METADATA))


def write_whole(path: Path, needed: int, pieces: Iterable[Any]) -> None:
    """Writes one file piece by piece; it appears whole or not at all.

    Args:
      path: The file; its directory exists.
      needed: Its size in bytes, roughly, for the message when there is no space.
      pieces: Bytes, or what lies in memory as bytes; taken one at a time.

    Raises:
      UserError: No space left, or the place is not writable.
    """
    if not is_first():
        _pass_over(pieces)
        return
    stage = _write_stage(path, needed, pieces)
    os.replace(stage, path)
    _sync_directory(path.parent)


def write_sharded(
    directory: Path,
    tensors: Iterable[OutTensor],
    max_shard_size: int = 5_000_000_000,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Writes a model's weights as transformers names them.

    `model.safetensors` when all fits into one shard, else
    `model-00001-of-0000N.safetensors` ... with `model.safetensors.index.json`. Every
    file is staged first, so the weights may come from the directory that is being
    written; weight files of an earlier save are removed.

    Args:
      directory: Made when missing.
      tensors: What to write, in this order; no name twice.
      max_shard_size: Bytes; a larger tensor gets a shard of its own.
      metadata: As for `write_safetensors`.

    Returns:
      The weight files, without the index.

    Raises:
      UserError: No space left, or the place is not writable.
    """
    directory = Path(directory)
    make_directory(directory)
    shards = list(_shards(tensors, max_shard_size))
    needed = sum(tensor.nbytes for shard in shards for tensor in shard)
    names = [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    if len(shards) == 1:
        names = [SINGLE_NAME]
    if not is_first():
        _pass_over(itertools.chain.from_iterable(_content(s, {}) for s in shards))
        return [directory / name for name in names]
    stages: list[Path] = []
    try:
        for name, shard in zip(names, shards, strict=True):
            stages.append(
                _stage(directory / name, shard, metadata or PT_METADATA, needed)
            )
        if len(shards) > 1:
            stages.append(_stage_index(directory / INDEX_NAME, names, shards))
    except BaseException:
        for stage in stages:
            stage.unlink(missing_ok=True)
        raise
    written = [*names, INDEX_NAME][: len(stages)]
    for stage, name in zip(stages, written, strict=True):
        os.replace(stage, directory / name)
    _remove_stale(directory, written)
    _sync_directory(directory)
    return [directory / name for name in names]


def _shards(
    tensors: Iterable[OutTensor], max_shard_size: int
) -> Iterator[list[OutTensor]]:
    shard: list[OutTensor] = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.nbytes > max_shard_size:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.nbytes
    yield shard


def _stage_index(path: Path, names: list[str], shards: list[list[OutTensor]]) -> Path:
    everything = [tensor for shard in shards for tensor in shard]
    index = {
        "metadata": {
            "total_parameters": sum(math.prod(tensor.shape) for tensor in everything),
            "total_size": sum(tensor.nbytes for tensor in everything),
        },
        "weight_map": {
            tensor.name: name
            for name, shard in zip(names, shards, strict=True)
            for tensor in shard
        },
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    return _write_stage(path, len(text), [text.encode()])


def _stage(
    path: Path, tensors: list[OutTensor], metadata: Mapping[str, str], needed: int
) -> Path:
    """Writes everything under a temporary name beside `path` and returns that name."""
    return _write_stage(path, needed, _content(tensors, metadata))


def _content(tensors: list[OutTensor], metadata: Mapping[str, str]) -> Iterator[Any]:
    ordered = sorted(tensors, key=lambda tensor: -np.dtype(tensor.dtype).itemsize)
    header = _header(ordered, metadata)
    pieces = (piece for tensor in ordered for piece in _pieces(tensor))
    return itertools.chain([header], pieces)


def _header(tensors: list[OutTensor], metadata: Mapping[str, str]) -> bytes:
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for tensor in tensors:
        if tensor.name in header:
            raise ValueError(f"tensor {tensor.name!r} comes twice")
        if np.dtype(tensor.dtype) not in codes:
            raise ValueError(
                f"tensor {tensor.name!r} has dtype {tensor.dtype}, which safetensors "
                f"has no name for; it has {', '.join(DTYPES)}"
            )
        header[tensor.name] = {
            "dtype": codes[np.dtype(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data starts aligned
    return len(text).to_bytes(8, "little") + text


def _pieces(tensor: OutTensor) -> Iterator[memoryview]:
    produced = tensor.produce()
    left = tensor.nbytes
    for piece in [produced] if hasattr(produced, "shape") else produced:
        array = np.ascontiguousarray(piece)
        if array.dtype != tensor.dtype:
            raise ValueError(
                f"tensor {tensor.name!r} came as {array.dtype}, not {tensor.dtype}"
            )
        left -= array.nbytes
        yield array.reshape(-1).view(np.uint8).data
    if left:
        raise ValueError(
            f"tensor {tensor.name!r} of shape {tensor.shape} came {-left:+,} bytes off"
        )


def _pass_over(pieces: Iterable[Any]) -> None:
    """Has every piece made, which all processes do together."""
    for _ in pieces:
        pass


def _write_stage(path: Path, needed: int, pieces: Iterable[Any]) -> Path:
    stage = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(stage, "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        stage.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _write_error(path, needed, error) from error
        raise
    return stage


def _write_error(path: Path, needed: int, error: OSError) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(
            f"no space left at {path}: this save needs {needed / 2**30:.3g} GiB; "
            f"free some, or name another directory"
        )
    return UserError(
        f"cannot write {path}: {error.strerror}; name a directory you may write to"
    )


def make_directory(directory: Path) -> None:
    """Makes a directory and its parents where they are missing.

    Raises:
      UserError: The place is not writable.
    """
    if not is_first():
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _write_error(directory, 0, error) from error


def _remove_stale(directory: Path, written: Collection[str]) -> None:
    """Removes an earlier save's weights: a stale one would win over the new index."""
    pattern = r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
    for path in directory.iterdir():
        if re.fullmatch(pattern, path.name) and path.name not in written:
            path.unlink()


def _sync_directory(directory: Path) -> None:
    # Renames survive a power cut only after this; not every system opens directories.
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

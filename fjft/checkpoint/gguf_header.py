"""Parses the head of a GGUF file: its metadata and its table of tensors.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import io
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fjft.errors import UserError

VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32  # by the format, when general.alignment is absent
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"}
SCALARS |= {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY, FLOAT32 = 8, 9, 6


class TableRow(NamedTuple):
    """One row of the table: `dims` fastest first, `offset` within the data."""

    name: str
    dims: tuple[int, ...]
    kind: int
    offset: int


def read_header(path: Path) -> tuple[dict[str, Any], list[TableRow], int]:
    """Reads everything before the data.

    Returns:
      The metadata (float32 values as the shortest decimals that round to them), the
      table of tensors, and where the data starts, in bytes.

    Raises:
      UserError: Not a GGUF file, of another version, corrupt or cut short.
    """
    try:
        with open(path, "rb") as file:
            return _read_header(path, file)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (struct.error, KeyError, ValueError, MemoryError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"the header of {path} is corrupt or cut short ({error}); fetch it again"
        ) from error


def require(path: Path, metadata: Mapping[str, Any], key: str) -> Any:
    """Looks up a number that a model cannot do without.

    Some are given layer by layer, which is the same when all layers agree.

    Raises:
      UserError: It is not there, or differs between layers.
    """
    if key not in metadata:
        raise UserError(
            f"{path} has no {key!r}, which the model cannot do without; "
            f"convert it again with a newer llama.cpp"
        )
    value = metadata[key]
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise UserError(
            f"{path} gives {key!r} layer by layer ({value}); only the same for all "
            f"layers is read"
        )
    return value[0]


def _read_header(
    path: Path, file: io.BufferedReader
) -> tuple[dict[str, Any], list[TableRow], int]:
    magic = file.read(4)
    if magic != b"GGUF":
        raise UserError(
            f"{path} is not a GGUF file: it starts with {magic!r}, not b'GGUF'"
        )
    version, tensor_count, pair_count = _unpack(file, "<IQQ")
    if version not in VERSIONS:
        raise UserError(
            f"{path} is GGUF version {version}; read are little-endian versions "
            f"{' and '.join(map(str, VERSIONS))}"
        )
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = _string(file)
        metadata[key] = _value(file, *_unpack(file, "<I"))
    table = []
    for _ in range(tensor_count):
        name = _string(file)
        (axes,) = _unpack(file, "<I")
        dims = _unpack(file, f"<{axes}Q")
        table.append(TableRow(name, dims, *_unpack(file, "<IQ")))
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    return metadata, table, -(-file.tell() // alignment) * alignment


def _unpack(file: io.BufferedReader, layout: str) -> tuple:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))


def _string(file: io.BufferedReader) -> str:
    length = int.from_bytes(file.read(8), "little")
    text = file.read(length)
    if len(text) < length:
        raise ValueError("it ends inside a string")
    return text.decode()


def _value(file: io.BufferedReader, kind: int) -> Any:
    if kind == STRING:
        return _string(file)
    if kind != ARRAY:
        return _numbers(file, kind, 1)[0]
    kind, count = _unpack(file, "<IQ")
    if kind in (STRING, ARRAY):
        return [_value(file, kind) for _ in range(count)]
    return _numbers(file, kind, count)


def _numbers(file: io.BufferedReader, kind: int, count: int) -> list:
    numbers = _unpack(file, f"<{count}{SCALARS[kind]}")
    if kind == FLOAT32:
        # 1e-5, not 9.999999747378752e-06: what the writer rounded to float32.
        return [float(str(np.float32(number))) for number in numbers]
    return list(numbers)

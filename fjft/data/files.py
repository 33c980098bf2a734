"""Readers of file formats: a path in, rows with exact line numbers out."""

import csv
import dataclasses
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fjft.errors import UserError


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One record of a source, or the place where one could not be read.

    Attributes:
      values: The record's columns; empty when `error` is set.
      file: Path, or the id of a Hugging Face dataset.
      line: Line on which the record starts, from 1; None for formats without lines.
      number: Number of the record in its file, from 1.
      error: Why the record could not be read.
    """

    values: dict[str, Any]
    file: str
    line: int | None
    number: int
    error: str | None = None

    @property
    def place(self) -> str:
        """`file:line`, or `file, row N` where there are no lines."""
        if self.line is None:
            return f"{self.file}, row {self.number}"
        return f"{self.file}:{self.line}"


# One record before it knows its file: (values, line, error).
Record = tuple[dict[str, Any], int | None, str | None]


def suffix_of(path: Path) -> str | None:
    """The suffix that names a known format, looking through `.gz`; else None."""
    suffixes = path.suffixes
    if suffixes and suffixes[-1].lower() == ".gz":
        suffixes = suffixes[:-1]
    suffix = suffixes[-1].lower() if suffixes else ""
    return suffix if suffix in SUFFIXES else None


def read_file(path: Path, sample_by: str = "paragraph") -> Iterator[Row]:
    """Streams one file's rows; what cannot be decoded becomes a row with an error.

    Args:
      path: The file.
      sample_by: What a row of plain text is, a key of `TEXTS`.

    Raises:
      UserError: The file cannot be opened.
    """
    suffix = suffix_of(path) or ""
    reader = TEXTS[sample_by] if suffix == ".txt" else SUFFIXES[suffix]
    try:
        opener = gzip.open if path.suffix.lower() == ".gz" else open
        stream = opener(path, "rb")
    except OSError as error:
        raise UserError(f"cannot open {path}: {error.strerror}") from error
    number, line = 0, None
    with stream:
        try:
            for number, (values, line, error) in enumerate(reader(stream), 1):
                yield Row(values, str(path), line, number, error)
        except (EOFError, OSError, zlib.error) as error:
            reason = f"the file breaks off: {error}"
            yield Row({}, str(path), line and line + 1, number + 1, reason)


def _read_jsonl(stream: BinaryIO) -> Iterator[Record]:
    for line, raw in enumerate(stream, 1):
        if not raw.strip():
            continue
        try:
            values = json.loads(raw.decode("utf-8-sig" if line == 1 else "utf-8"))
        except UnicodeDecodeError:
            yield {}, line, "not UTF-8"
        except (ValueError, RecursionError):
            yield {}, line, "not valid JSON"
        else:
            yield _check_object(values, line)


def _check_object(values: Any, line: int | None) -> Record:
    if isinstance(values, dict):
        return values, line, None
    return {}, line, "not a JSON object"


def _read_json(stream: BinaryIO) -> Iterator[Record]:
    """A list of rows, `{"data": [...]}`, or lines (many `.json` files hold lines)."""
    try:
        values = json.loads(stream.read().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            stream.seek(0)
            yield from _read_jsonl(stream)
        else:
            yield {}, error.lineno, "not valid JSON"
        return
    except UnicodeDecodeError:
        yield {}, None, "not UTF-8"
        return
    if isinstance(values, dict) and isinstance(values.get("data"), list):
        values = values["data"]
    for value in values if isinstance(values, list) else [values]:
        yield _check_object(value, None)


def _decode(stream: BinaryIO) -> Iterator[str]:
    """Lines of text; bytes that are not UTF-8 stay visible as lone surrogates."""
    for line, raw in enumerate(stream):
        text = raw.decode("utf-8", "surrogateescape")
        yield text.removeprefix("\ufeff") if line == 0 else text


def _is_broken(text: str) -> bool:
    return not text.isascii() and any("\udc80" <= c <= "\udcff" for c in text)


def _read_csv(stream: BinaryIO, delimiter: str = ",") -> Iterator[Record]:
    # The module's limit of 128 KiB a field is smaller than many documents.
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(_decode(stream), delimiter=delimiter)
    names = next(reader, [])
    start = reader.line_num + 1
    for fields in reader:
        if len(fields) == len(names):
            broken = any(map(_is_broken, fields))
            values = {} if broken else dict(zip(names, fields, strict=True))
            yield values, start, "not UTF-8" if broken else None
        elif fields:
            yield {}, start, "a CSV row with more or fewer fields than the header"
        start = reader.line_num + 1


def _read_tsv(stream: BinaryIO) -> Iterator[Record]:
    return _read_csv(stream, delimiter="\t")


def _read_lines(stream: BinaryIO) -> Iterator[Record]:
    for number, line in enumerate(_decode(stream), 1):
        if line.strip():
            yield _make_document([line], number)


def _read_document(stream: BinaryIO) -> Iterator[Record]:
    lines = list(_decode(stream))
    if any(line.strip() for line in lines):
        yield _make_document(lines, 1)


def _read_paragraphs(stream: BinaryIO) -> Iterator[Record]:
    """Each run of lines between blank lines is one document."""
    lines: list[str] = []
    start = 1
    for number, line in enumerate(_decode(stream), 1):
        if line.strip():
            start = start if lines else number
            lines.append(line)
        elif lines:
            yield _make_document(lines, start)
            lines = []
    if lines:
        yield _make_document(lines, start)


def _make_document(lines: list[str], start: int) -> Record:
    text = "".join(lines).rstrip("\r\n")
    if _is_broken(text):
        return {}, start, "not UTF-8"
    return {"text": text}, start, None


def _read_parquet(stream: BinaryIO) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(stream)
        for batch in table.iter_batches(batch_size=1024):
            for values in batch.to_pylist():
                yield values, None, None
    except pyarrow.ArrowException as error:
        yield {}, None, f"not a readable Parquet file: {error}"


def _read_yaml(stream: BinaryIO) -> Iterator[Record]:
    """A mapping whose `conversations` is a list of lists of turns."""
    import yaml

    # The base loader leaves every scalar a string: "yes" and "42" are answers here.
    loader_class = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    try:
        loader = loader_class(stream.read())
        root = loader.get_single_node()
        found = []
        if isinstance(root, yaml.MappingNode):
            found = [v for k, v in root.value if k.value == "conversations"]
        if not found or not isinstance(found[0], yaml.SequenceNode):
            yield {}, 1, "no list of `conversations` in the YAML file"
            return
        for node in found[0].value:
            turns = loader.construct_object(node, deep=True)
            yield {"conversations": turns}, node.start_mark.line + 1, None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        yield {}, mark.line + 1 if mark else None, "not valid YAML"


def _read_dictionary(stream: BinaryIO) -> Iterator[Record]:
    """A word and what it stands for in each line, as CMUdict has them.

    What follows ` #` is a comment; of words with several lines, `a` and `a(2)`, the
    first counts, so that no word is both learned and held out.
    """
    for number, line in enumerate(_decode(stream), 1):
        word, _, meaning = f" {line}".partition(" #")[0].strip().partition(" ")
        if _is_broken(line):
            yield {}, number, "not UTF-8"
        elif word and not word.endswith(")"):
            yield {"source": word, "target": meaning.strip()}, number, None


# The names are those of datasets' loader of text.
TEXTS: dict[str, Callable[[Any], Iterator[Record]]] = {
    "paragraph": _read_paragraphs,
    "line": _read_lines,
    "document": _read_document,
}
SUFFIXES = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".txt": _read_paragraphs,
    ".dict": _read_dictionary,
    ".yml": _read_yaml,
    ".yaml": _read_yaml,
}

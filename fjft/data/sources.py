"""Where rows come from: local files, installed packages, Hugging Face datasets."""

import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fjft.data.files import SUFFIXES, Row, read_file, suffix_of
from fjft.errors import UserError
from fjft.sources import is_package, resolve_package

_SPLIT = re.compile(r"(?P<name>[^\[]+?)(\[:(?P<take>\d+)\])?")


# Specs with commas, or several of them, or such by name.
Sources = str | Sequence[str] | Mapping[str, str | Sequence[str]]


def list_specs(sources: Sources) -> list[str]:
    """Splits `a.jsonl,b.jsonl`, or several such strings, into single specs."""
    if isinstance(sources, str):
        return [spec for part in sources.split(",") if (spec := part.strip())]
    texts = sources.values() if isinstance(sources, Mapping) else sources
    return [spec for text in texts for spec in list_specs(text)]


def read_rows(
    sources: Sources, split: str = "train", sample_by: str = "paragraph"
) -> Iterator[Row]:
    """Streams the rows of one source or several, one after the other.

    Args:
      sources: Specs as `Config.train` describes them. Formats go by suffix: `.jsonl`,
        `.json`, `.csv`, `.tsv`, `.parquet`, `.txt`, `.dict`, `.yml`, `.yaml`; all but
        Parquet may also end in `.gz`. A directory means every such file below it,
        sorted.
      split: The split of a Hugging Face dataset whose spec names none.
      sample_by: What a row of a `.txt` file is, a key of `files.TEXTS`.

    Yields:
      Rows in order; a record that cannot be read is a row with `error` set.

    Raises:
      UserError: A source does not exist, has an unknown suffix or cannot be opened.
    """
    for spec in list_specs(sources):
        paths = find_files(spec)
        if paths is None:
            yield from read_hub(spec, split)
        for path in paths or ():
            yield from read_file(path, sample_by)


def find_files(spec: str) -> list[Path] | None:
    """The files that `spec` means, or None if it is a Hugging Face dataset's id.

    Raises:
      UserError: Nothing matches, or a matching file has an unknown suffix.
    """
    path = Path(spec).expanduser()
    if is_package(spec):
        matches = resolve_package(spec)
    elif path.exists():
        matches = [path]
    elif glob.has_magic(spec.split(":")[0]):
        matches = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
    elif suffix_of(path) or spec.startswith((".", "/", "~")):
        matches = []
    else:
        return None
    paths = []
    for match in matches:
        if match.is_dir():
            below = sorted(p for p in match.rglob("*") if p.is_file())
            paths += [p for p in below if suffix_of(p) and not p.name.startswith(".")]
        elif suffix_of(match):
            paths.append(match)
        else:
            raise UserError(
                f"{match} has no known format; use {', '.join(SUFFIXES)}, also with .gz"
            )
    if not paths:
        raise UserError(f"data source {spec!r} matches no file with a known format")
    return paths


def read_hub(spec: str, split: str = "train") -> Iterator[Row]:
    """Streams a Hugging Face dataset: `id`, `id:split` or `id:config:split`.

    Raises:
      UserError: The dataset, its config or its split cannot be loaded.
    """
    import datasets

    name, *rest = spec.split(":", 1)
    # The slice has a colon of its own: `id:config:train[:1000]`.
    parts = re.split(r":(?![^\[]*\])", rest[0]) if rest else [split]
    match = _SPLIT.fullmatch(parts[-1])
    if len(parts) > 2 or match is None:
        raise UserError(
            f"data source {spec!r} is neither a file nor id, id:split or "
            "id:config:split (with split[:N] for the first N rows)"
        )
    config = parts[0] if len(parts) == 2 else None
    try:
        rows = datasets.load_dataset(name, config, split=match["name"], streaming=True)
        if match["take"]:
            rows = rows.take(int(match["take"]))
        for number, values in enumerate(rows, 1):
            yield Row(dict(values), spec, None, number)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"data source {spec!r} is no local file and could not be loaded from the "
            f"Hugging Face hub: {type(error).__name__}: {reason}"
        ) from error

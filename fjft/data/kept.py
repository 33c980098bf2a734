"""Tokenized data, kept from run to run.

What took long to read lies in a directory of its own: the arrays of `Examples`, and the
account of what became of the rows. The directory's name is a digest of all that these
follow from: the files with their times, or the commit of a dataset; the config, the
seed and the labels; the tokenizer, and the code that was at work.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import pickle
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fjft.data.config import Config
from fjft.data.examples import Examples, Labels, Notes
from fjft.data.report import Report
from fjft.data.sources import find_files, list_specs

# What is tokenized faster is not worth its place on the disk.
MIN_SECONDS = 0.2
# What no run has used for so many seconds is deleted.
MAX_AGE = 30 * 86_400

_CODE = Path(__file__).parent
_DIGEST_BYTES = 16
_NAME = re.compile(f"[0-9a-f]{{{2 * _DIGEST_BYTES}}}")
_LIBRARIES = ("transformers", "tokenizers", "datasets")
# What happens to examples later, and so is nothing that they follow from.
_LATER = {
    "eval_size": 0.0,
    "eval_shots": 0,
    "mixture_weights": {},
    "mixture_temperature": 1.0,
    "packing": True,
    "buckets": (),
    "shuffle": True,
    "cache": "",
}
_ARRAYS = ("tokens", "starts", "lengths", "supervised", "row_numbers", "targets")
_NOTES = ("data", "starts", "ends")


class Keeper:
    """Knows where that is kept which a config, a tokenizer and a seed make of sources.

    Args:
      config: The data section; its `cache` is where.
      tokenizer: Of the examples.
      labels: What they are labelled with.
      seed: Of what is drawn for a row.
    """

    def __init__(
        self, config: Config, tokenizer: Any, labels: Labels | None, seed: int
    ):
        self._root = Path(config.cache).expanduser() if config.cache else None
        self._choices = dataclasses.replace(config, **_LATER), labels, seed
        self._tokenizer = tokenizer

    @functools.cached_property
    def _digest(self) -> Any:
        """Of all but the sources."""
        digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        for fact in (
            self._choices,
            self._tokenizer.backend_tokenizer.to_str(),
            self._tokenizer.chat_template,
            self._tokenizer.special_tokens_map,
            [path.read_bytes() for path in sorted(_CODE.glob("*.py"))],
            [importlib.metadata.version(name) for name in _LIBRARIES],
        ):
            digest.update(repr(fact).encode())
        return digest

    def find_place(self, sources: Mapping[str, Any], option: str) -> Path | None:
        """The directory of examples of these sources, there or not.

        Args:
          sources: Where rows are, by name.
          option: Of which these are the value; chooses a dataset's split.

        Returns:
          None where nothing is to be kept, or nothing tells whether a dataset is the
          same as before.
        """
        if self._root is None:
            return None
        states = [_state_of(spec) for spec in list_specs(sources)]
        if None in states:
            return None
        digest = self._digest.copy()
        digest.update(repr((sources, option, states)).encode())
        return self._root / digest.hexdigest()


def load(
    place: Path, columns: tuple[str, ...], labels: Labels | None
) -> tuple[Examples, Report] | None:
    """What a directory keeps; None if that is nothing, or nothing whole."""
    try:
        report, names = pickle.loads((place / "report.pickle").read_bytes())
        # Plain arrays over the mappings: slices of np.memmap itself are slow.
        arrays = {
            name: np.asarray(np.load(place / f"{name}.npy", mmap_mode="r"))
            for name in names
        }
    except (OSError, EOFError, ValueError, pickle.UnpicklingError):
        return None
    with contextlib.suppress(OSError):  # it may be another user's
        os.utime(place)
    notes = [arrays.pop(f"notes.{n}") for n in _NOTES if f"notes.{n}" in arrays]
    examples = Examples(
        **arrays,
        columns=columns,
        labels=labels,
        notes=Notes(*notes) if notes else None,
    )
    return examples, dataclasses.replace(report, kept=f"tokenized before, in {place}")


def save(place: Path, examples: Examples, report: Report) -> Report:
    """Keeps what was read and the account of it, if the disk allows it.

    Returns:
      The account, which says so.
    """
    arrays = {name: getattr(examples, name) for name in _ARRAYS}
    arrays |= {f"notes.{n}": getattr(examples.notes, n, None) for n in _NOTES}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    part = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix="part-", dir=place.parent))
        for name, array in arrays.items():
            np.save(part / f"{name}.npy", array)
        (part / "report.pickle").write_bytes(pickle.dumps((report, list(arrays))))
        shutil.rmtree(place, ignore_errors=True)
        os.replace(part, place)
        _delete_old(place.parent)
    except OSError as error:
        reason = f"not kept for the next start: {place.parent}: {error.strerror}"
        return dataclasses.replace(report, kept=reason)
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)
    return dataclasses.replace(report, kept=f"kept for the next start in {place}")


def _delete_old(root: Path) -> None:
    for place in root.iterdir():
        with contextlib.suppress(OSError):  # another process was faster
            is_old = time.time() - place.stat().st_mtime > MAX_AGE
            if is_old and _NAME.fullmatch(place.name):
                shutil.rmtree(place)


def _state_of(spec: str) -> Any:
    """What tells a source from a later state of itself; None if nothing does."""
    files = find_files(spec)
    if files is None:
        return _commit_of(spec.partition(":")[0])
    found = [(str(path.resolve()), path.stat()) for path in files]
    return [(path, stat.st_size, stat.st_mtime_ns) for path, stat in found]


def _commit_of(dataset: str) -> str | None:
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().dataset_info(dataset, timeout=10).sha
    except Exception:
        return None  # Whatever hinders, it is said when the dataset is read.

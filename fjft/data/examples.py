"""Tokenized examples on disk: host memory does not grow with the data."""

import array
import dataclasses
import errno
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from fjft.data.templates import MalformedError
from fjft.errors import UserError
from fjft.labels import IGNORED

TEXT_COLUMNS = ("input_ids", "labels")


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """A tokenized sample.

    Attributes:
      columns: int32 [t] arrays by name, a number for each token; `input_ids` first.
      target: What the example as a whole is labelled with, as `Labels` says; None
        where its tokens are what is learned.
      end_tokens: For each learned turn or document that ends in a special token, that
        token's id.
      is_truncated: Whether it was cut to `max_length`.
      note: What an evaluation wants to know of it besides; no batch has it.
    """

    columns: Mapping[str, np.ndarray]
    target: np.ndarray | None = None
    end_tokens: tuple[int, ...] = ()
    is_truncated: bool = False
    note: str = ""

    def __len__(self) -> int:
        return len(self.columns["input_ids"])


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a batch of B rows of T tokens holds besides their positions and segments.

    Attributes:
      columns: Names of what it has for each token, int32 [B, T].
      no_target: What stands for the label of a whole example where there is none; a
        batch has S of them in a row. None if examples have no such labels.
      num_parts: P, the texts that an example is made of.
      is_numbered: Whether a batch says which examples its segments are of.
    """

    columns: tuple[str, ...] = TEXT_COLUMNS
    no_target: np.ndarray | None = None
    num_parts: int = 1
    is_numbered: bool = False


def without_label(shape: Sequence[int], dtype: np.typing.DTypeLike) -> np.ndarray:
    """The label of an example where there is none: -100, or NaN among numbers."""
    filler = np.nan if np.dtype(dtype).kind == "f" else IGNORED
    return np.full(shape, filler, dtype)


class Draw(Protocol):
    """What is drawn anew of an example in every epoch.

    Attributes:
      columns: Names of the columns that it gives.
    """

    columns: tuple[str, ...]

    def measure(self, lengths: np.ndarray) -> np.ndarray:
        """Tokens of drawn examples, of those that have so many."""
        ...

    def __call__(self, example: Example, random: np.random.Generator) -> Example:
        """The example with these columns, from numbers of this generator only."""
        ...


# What a row becomes: an example, several pieces of one, or the reason why it cannot be.
Encoded = Example | list[Example] | MalformedError


@dataclasses.dataclass(frozen=True)
class Labels:
    """What labels mean.

    Attributes:
      problem_type: transformers' name of what whole examples are labelled with:
        `single_label_classification` (a target is the label's id, int32 []),
        `multi_label_classification` (a 1 for each label that an example has, int32
        [C]) or `regression` (float32 [C]). None if each token has a label.
      names: The labels in the order of their ids, or the names of the numbers.
    """

    problem_type: str | None
    names: tuple[str, ...]

    def of(self, example: Example) -> list[str]:
        """The labels of one example, or of its tokens; of a regression, its numbers."""
        target = example.target
        if target is None:
            labels = example.columns["labels"]
            ids = labels[labels != IGNORED]
        elif self.problem_type == "regression":
            return [f"{x:g}" for x in target]
        else:
            ids = np.flatnonzero(target) if target.ndim else target[None]
        return [self.names[i] for i in ids]


@dataclasses.dataclass(frozen=True)
class Notes:
    """Texts in a file, one for each example.

    Attributes:
      data: uint8, all of them in UTF-8.
      starts: int64 [n], where each begins.
      ends: int64 [n], where each ends.
    """

    data: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def __getitem__(self, index: int) -> str:
        return self.data[self.starts[index] : self.ends[index]].tobytes().decode()

    def take(self, indices: np.ndarray) -> "Notes":
        """The notes at `indices`, sharing the same file."""
        return Notes(self.data, self.starts[indices], self.ends[indices])


class Examples:
    """A sequence of examples.

    Attributes:
      tokens: int32 [total, columns], all of them in a file.
      starts: int64 [n], where each begins in it.
      columns: The names of their columns.
      labels: What `targets` mean; None where there are none.
      targets: [n, ...], what each example as a whole is labelled with, or None.
      lengths: int32 [n], tokens in each example.
      supervised: int32 [n], learned tokens in each; 1 where it is learned as a whole.
      row_numbers: int64 [n], the source row each came from, counted from 0 over all
        sources.
      notes: Their notes, if any has one.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        starts: np.ndarray,
        lengths: np.ndarray,
        supervised: np.ndarray,
        row_numbers: np.ndarray,
        *,
        columns: tuple[str, ...] = TEXT_COLUMNS,
        labels: Labels | None = None,
        targets: np.ndarray | None = None,
        notes: Notes | None = None,
    ):
        self.tokens = tokens
        self.starts = starts
        self.lengths = lengths
        self.supervised = supervised
        self.row_numbers = row_numbers
        self.columns = columns
        self.labels = labels
        self.targets = targets
        self.notes = notes

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        start = self.starts[index]
        rows = self.tokens[start : start + self.lengths[index]]
        return Example(
            {name: rows[:, i] for i, name in enumerate(self.columns)},
            None if self.targets is None else self.targets[index],
        )

    def take(self, indices: np.ndarray) -> "Examples":
        """The examples at `indices`, sharing the same file."""
        return Examples(
            self.tokens,
            self.starts[indices],
            self.lengths[indices],
            self.supervised[indices],
            self.row_numbers[indices],
            columns=self.columns,
            labels=self.labels,
            targets=None if self.targets is None else self.targets[indices],
            notes=None if self.notes is None else self.notes.take(indices),
        )


class Spool:
    """Collects examples in a temporary file, deleted with the last `Examples` on it.

    Args:
      directory: Where the file goes; the system's temporary directory if None.
      columns: Names of the columns that every example has.
      labels: What the targets of whole examples mean, if they have any.
    """

    def __init__(
        self,
        directory: Path | None = None,
        columns: tuple[str, ...] = TEXT_COLUMNS,
        labels: Labels | None = None,
    ):
        self._columns = columns
        self._labels = labels
        self._targets: list[np.ndarray] = []
        self._directory = Path(tempfile.mkdtemp(prefix="fjft-data-", dir=directory))
        self._cleanup = weakref.finalize(self, shutil.rmtree, self._directory, True)
        self._path = self._directory / "tokens.int32"
        self._notes_path = self._directory / "notes.utf8"
        self._note_sizes = array.array("q")
        self._lengths = array.array("i")
        self._supervised = array.array("i")
        self._row_numbers = array.array("q")

    def add(self, examples: Sequence[Example], rows: Sequence[int]) -> None:
        """Appends examples that came from these source rows.

        Raises:
          UserError: No space is left.
        """
        if not examples:
            return
        columns = [
            np.concatenate([e.columns[name] for e in examples])
            for name in self._columns
        ]
        notes = [e.note.encode() for e in examples]
        try:
            with self._path.open("ab") as file:
                # Token by token, so that one read fetches an example whole.
                np.stack(columns, axis=1).astype(np.int32).tofile(file)
            with self._notes_path.open("ab") as file:
                file.write(b"".join(notes))
        except OSError as error:
            if error.errno != errno.ENOSPC and "requested and" not in str(error):
                raise
            raise UserError(
                f"no space left in {self._directory} for the tokenized data; free "
                "some, or point the environment variable TMPDIR elsewhere"
            ) from error
        self._note_sizes.extend(map(len, notes))
        self._lengths.extend(len(e) for e in examples)
        self._supervised.extend(map(self._count_supervised, examples))
        self._row_numbers.extend(rows)
        targets = [e.target for e in examples if e.target is not None]
        if targets:
            self._targets.append(np.stack(targets))

    def _count_supervised(self, example: Example) -> int:
        labels = example.columns.get("labels")
        return 1 if labels is None else int((labels != IGNORED).sum())

    def finish(self) -> Examples:
        """Opens what was collected for reading."""
        lengths = np.array(self._lengths, np.int32)
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        if len(lengths):
            # A plain array over the mapping: slices of np.memmap itself are slow.
            tokens = np.asarray(np.memmap(self._path, np.int32, "r"))
        else:
            tokens = np.zeros(0, np.int32)
        notes = self._open_notes()
        # The mapping outlives the file's name, so the directory can go at once where
        # the system allows that; elsewhere it goes when the process ends.
        self._cleanup()
        return Examples(
            tokens.reshape(-1, len(self._columns)),
            starts,
            lengths,
            np.array(self._supervised, np.int32),
            np.array(self._row_numbers, np.int64),
            columns=self._columns,
            labels=self._labels,
            targets=np.concatenate(self._targets) if self._targets else None,
            notes=notes,
        )

    def _open_notes(self) -> Notes | None:
        ends = np.cumsum(self._note_sizes, dtype=np.int64)
        if not ends.size or not ends[-1]:
            return None
        data = np.asarray(np.memmap(self._notes_path, np.uint8, "r"))
        return Notes(data, ends - np.array(self._note_sizes), ends)

"""Tokenized examples on disk: host memory does not grow with the data."""

import array
import errno
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fjft.errors import UserError

IGNORED = -100


class Examples:
    """A sequence of examples, each an (input_ids, labels) pair of int32 arrays.

    Attributes:
      lengths: int32 [n], tokens in each example.
      supervised: int32 [n], learned tokens in each.
      row_numbers: int64 [n], the source row each came from, counted from 0 over all
        sources.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        starts: np.ndarray,
        lengths: np.ndarray,
        supervised: np.ndarray,
        row_numbers: np.ndarray,
    ):
        self._tokens = tokens  # int32 [2, total]: ids, labels
        self._starts = starts  # int64 [n]: where each example begins
        self.lengths = lengths
        self.supervised = supervised
        self.row_numbers = row_numbers

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        start = self._starts[index]
        both = self._tokens[start : start + self.lengths[index]]
        return both[:, 0], both[:, 1]

    def take(self, indices: np.ndarray) -> "Examples":
        """The examples at `indices`, sharing the same file."""
        return Examples(
            self._tokens,
            self._starts[indices],
            self.lengths[indices],
            self.supervised[indices],
            self.row_numbers[indices],
        )


class Spool:
    """Collects examples in a temporary file, deleted with the last `Examples` on it.

    Args:
      directory: Where the file goes; the system's temporary directory if None.
    """

    def __init__(self, directory: Path | None = None):
        self._directory = Path(tempfile.mkdtemp(prefix="fjft-data-", dir=directory))
        self._cleanup = weakref.finalize(self, shutil.rmtree, self._directory, True)
        self._path = self._directory / "tokens.int32"
        self._lengths = array.array("i")
        self._supervised = array.array("i")
        self._row_numbers = array.array("q")

    def add(
        self, examples: Sequence[tuple[np.ndarray, np.ndarray]], rows: Sequence[int]
    ) -> None:
        """Appends (input_ids, labels) pairs that came from these source rows.

        Raises:
          UserError: No space is left.
        """
        if not examples:
            return
        ids = np.concatenate([ids for ids, _ in examples])
        labels = np.concatenate([labels for _, labels in examples])
        try:
            with self._path.open("ab") as file:
                # Pairs, so that one read fetches an example whole.
                np.stack([ids, labels], axis=1).astype(np.int32).tofile(file)
        except OSError as error:
            if error.errno != errno.ENOSPC and "requested and" not in str(error):
                raise
            raise UserError(
                f"no space left in {self._directory} for the tokenized data; free "
                "some, or point the environment variable TMPDIR elsewhere"
            ) from error
        self._lengths.extend(len(ids) for ids, _ in examples)
        self._supervised.extend(int((y != IGNORED).sum()) for _, y in examples)
        self._row_numbers.extend(rows)

    def finish(self) -> Examples:
        """Opens what was collected for reading."""
        lengths = np.array(self._lengths, np.int32)
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        if len(lengths):
            # A plain array over the mapping: slices of np.memmap itself are slow.
            tokens = np.asarray(np.memmap(self._path, np.int32, "r")).reshape(-1, 2)
        else:
            tokens = np.zeros((0, 2), np.int32)
        # The mapping outlives the file's name, so the directory can go at once where
        # the system allows that; elsewhere it goes when the process ends.
        self._cleanup()
        return Examples(
            tokens,
            starts,
            lengths,
            np.array(self._supervised, np.int32),
            np.array(self._row_numbers, np.int64),
        )

"""Examples to rows of fixed length.

    lengths [5, 3, 2, 4], capacity 8  ->  bins [[0, 1], [3, 2]]

    input_ids    a a a a a b b b      d d d d c c 0 0
    positions    0 1 2 3 4 0 1 2      0 1 2 3 0 1 0 0
    segment_ids  1 1 1 1 1 2 2 2      1 1 1 1 2 2 0 0

An example is never split, and padding is segment 0: no token id stands for it. Where an
example is made of several texts, its column `parts` says which of them each token is
of, from 0, and each is a segment of its own: of two the first example has 1 and 2, the
second 3 and 4.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from fjft.data.config import Config
from fjft.data.examples import Draw, Example, Examples, Layout, without_label
from fjft.errors import UserError
from fjft.labels import IGNORED

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Bins:
    """Which examples share a row.

    Attributes:
      order: int64 [n], example indices, bin after bin.
      starts: int64 [bins + 1]: bin i is `order[starts[i]:starts[i + 1]]`.
    """

    order: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.order[self.starts[index] : self.starts[index + 1]]


def pack_best_fit(lengths: np.ndarray, capacity: int) -> Bins:
    """Packs by best fit decreasing ("Fewer Truncations", arXiv 2404.10830).

    Longest first, each example goes into the fullest bin that still holds it. Free
    space is a whole number up to `capacity`, so which spaces exist is one big integer
    with a bit for each, and the best fit is the lowest bit from the length upwards.

    Args:
      lengths: [n] whole numbers, 1 to `capacity`.
      capacity: Tokens in a bin.

    Returns:
      Bins that hold every example exactly once; the same for the same lengths.

    Raises:
      ValueError: A length is out of range.
    """
    lengths = np.asarray(lengths)
    if lengths.size and not 0 < lengths.min() <= lengths.max() <= capacity:
        raise ValueError(
            f"lengths from {lengths.min()} to {lengths.max()} do not lie between 1 "
            f"and the capacity {capacity}"
        )
    by_length = np.argsort(-lengths, kind="stable")
    bin_of = np.empty(len(lengths), np.int64)
    with_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0
    bins = 0
    for example, length in zip(
        by_length.tolist(), lengths[by_length].tolist(), strict=True
    ):
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            chosen = with_space[space].pop()
            if not with_space[space]:
                spaces ^= 1 << space
        else:
            space, chosen = capacity, bins
            bins += 1
        bin_of[example] = chosen
        rest = space - length
        if rest:
            with_space[rest].append(chosen)
            spaces |= 1 << rest
    order = by_length[np.argsort(bin_of[by_length], kind="stable")]
    counts = np.bincount(bin_of, minlength=bins) if bins else np.zeros(0, np.int64)
    return Bins(order, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))


def choose_buckets(max_length: int, longest: int, buckets: Sequence[int]) -> list[int]:
    """The lengths to pad to, increasing.

    Args:
      max_length: Tokens in the longest example there may be.
      longest: Tokens in the longest example there is.
      buckets: The user's choice; empty for an eighth, a quarter, a half and all of
        `max_length`, the first three rounded up to a multiple of 8.

    Raises:
      UserError: The longest example fits no bucket.
    """
    if not buckets:
        parts = {-(-max_length // (8 * d)) * 8 for d in (2, 4, 8)}
        return sorted({min(part, max_length) for part in parts} | {max_length})
    if buckets[-1] < longest:
        raise UserError(
            f"data.buckets ends at {buckets[-1]}, but the longest example has "
            f"{longest} tokens; add a bucket of at least {longest} or lower "
            "data.max_length"
        )
    return list(buckets)


def empty_batch(
    batch_size: int, length: int, layout: Layout, num_examples: int = 1
) -> Batch:
    """A batch that is padding only.

    Args:
      batch_size: B.
      length: T.
      layout: What it holds.
      num_examples: S, the examples that a row has at most.

    Returns:
      int32 [B, T] arrays: the columns, `positions` and `segment_ids`. Where whole
      examples have labels, `labels` is [B, S, ...] with that of segment s of a row at
      s - 1. Where the layout is numbered, `examples` is int32 [B, S, P], the number of
      the example that each segment is of, and -1 where there is none.
    """
    tokens, examples = (batch_size, length), (batch_size, num_examples)
    batch: Batch = {
        name: np.full(tokens, IGNORED if name == "labels" else 0, np.int32)
        for name in (*layout.columns, "positions", "segment_ids")
    }
    if layout.no_target is not None:
        shape = *examples, *layout.no_target.shape
        batch["labels"] = np.broadcast_to(layout.no_target, shape).copy()
    if layout.is_numbered:
        batch["examples"] = np.full((*examples, layout.num_parts), -1, np.int32)
    return batch


class Rows:
    """Examples laid out in rows: packed, or one to a row.

    Args:
      examples: The examples.
      config: `packing`, `max_length` and `buckets` are used.
      draw: What each epoch draws anew of an example; None if nothing.
      num_parts: Texts that an example is made of.

    Attributes:
      examples: The examples.
      bins: Which examples share a row; None without packing.
      buckets: The row lengths that occur, increasing; `(max_length,)` with packing.
      lengths: int64 [rows], tokens in each row.

    Raises:
      UserError: An example fits no bucket.
    """

    def __init__(
        self,
        examples: Examples,
        config: Config,
        draw: Draw | None = None,
        num_parts: int = 1,
    ):
        self.examples = examples
        columns = examples.columns if draw is None else draw.columns
        targets = examples.targets
        self._layout = Layout(
            columns=tuple(name for name in columns if name != "parts"),
            no_target=None
            if targets is None
            else without_label(targets.shape[1:], targets.dtype),
            num_parts=num_parts,
            is_numbered=examples.notes is not None or num_parts > 1,
        )
        self._draw = draw
        lengths = examples.lengths if draw is None else draw.measure(examples.lengths)
        self._measured = lengths
        self.bins: Bins | None = None
        if config.packing:
            self.bins = pack_best_fit(lengths, config.max_length)
            self.buckets = (config.max_length,)
            sums = np.concatenate(
                [[0], np.cumsum(lengths[self.bins.order], dtype=np.int64)]
            )
            self.lengths = np.diff(sums[self.bins.starts])
        else:
            longest = int(lengths.max(initial=0))
            self.buckets = tuple(
                choose_buckets(config.max_length, longest, config.buckets)
            )
            self.lengths = lengths.astype(np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    @functools.cached_property
    def _most_examples(self) -> int:
        """S, the examples that a row has at most."""
        return 1 if self.bins is None else int(np.diff(self.bins.starts).max(initial=1))

    @property
    def efficiency(self) -> float:
        """Fraction of positions that hold tokens, each row in its smallest bucket."""
        fitting = np.array(self.buckets)[np.searchsorted(self.buckets, self.lengths)]
        return float(self.lengths.sum() / max(fitting.sum(), 1))

    def choose_length(self, indices: np.ndarray) -> int:
        """The smallest bucket that fits all of these rows."""
        longest = self.lengths[indices].max(initial=0)
        return self.buckets[int(np.searchsorted(self.buckets, longest))]

    @property
    def longest(self) -> int:
        """Tokens of a row in the longest batch that there may be."""
        return self.choose_length(np.arange(len(self)))

    def check_texts(self, limit: int | None) -> None:
        """Refuses texts that a model has no positions for.

        Args:
          limit: Tokens of the longest text that it can read; None is any.

        Raises:
          UserError: There is a longer one.
        """
        if limit is None:
            return
        for index in np.flatnonzero(self._measured > limit).tolist():
            example = self.example(index)
            parts = example.columns.get("parts", np.zeros(len(example), np.int32))
            longest = np.bincount(parts).max()
            if longest > limit:
                row = self.examples.row_numbers[index]
                raise UserError(
                    f"a text of row {row} has {longest} tokens, and the model has "
                    f"positions for {limit}; set data.max_length={limit}"
                )

    def example(self, index: int, seed: Sequence[int] = (0,)) -> Example:
        """An example; what is drawn of it follows from its number and the seed."""
        example = self.examples[index]
        if self._draw is None:
            return example
        return self._draw(example, np.random.default_rng((*seed, index)))

    def assemble(
        self,
        indices: np.ndarray,
        batch_size: int,
        length: int,
        seed: Sequence[int] = (0,),
    ) -> Batch:
        """Builds a batch.

        Args:
          indices: Rows to put first; the rest of the batch is padding.
          batch_size: B.
          length: T, at least as long as each of the rows.
          seed: Of what is drawn of each example.

        Returns:
          What `empty_batch` has.
        """
        layout = self._layout
        batch = empty_batch(batch_size, length, layout, self._most_examples)
        for row, index in enumerate(indices):
            members = [index] if self.bins is None else self.bins[index]
            start = 0
            for place, example in enumerate(members):
                member = self.example(example, seed)
                end = start + len(member)
                for name in layout.columns:
                    batch[name][row, start:end] = member.columns[name]
                parts = member.columns.get("parts", np.zeros(len(member), np.int32))
                # What is sorted is found where it begins.
                positions = np.arange(len(parts)) - np.searchsorted(parts, parts)
                batch["positions"][row, start:end] = positions
                first = place * layout.num_parts + 1
                batch["segment_ids"][row, start:end] = first + parts
                if member.target is not None:
                    batch["labels"][row, place] = member.target
                if "examples" in batch:
                    batch["examples"][row, place, np.unique(parts)] = example
                start = end
        return batch

"""Rows to this process's part of each global batch.

Global batch k depends on the seed and k alone. So the whole state is k, and neither a
restart nor another number of processes changes what is learned when.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fjft.data.pack import Batch, Rows
from fjft.errors import UserError

# Assembling a batch is copying; a few batches in advance hide it behind a step.
_THREADS = 2
_PREFETCHED_BATCHES = 4

# Rounds of the block cipher that permutes indices; grain's own choice.
_SHUFFLE_ROUNDS = 4


class Loader:
    """Serves batches, and remembers how far it came.

    Iterating continues where the state points: at the start, after `restore`, or
    after the last batch served. Each epoch is a new order of all rows, and its last
    batch is filled up with empty rows (segment 0), so every row is seen exactly once
    an epoch.

    Args:
      rows: What to serve.
      batch_size: B, rows in a global batch, over all processes.
      seed: Chooses the order.
      num_epochs: Passes over the rows; None for no end.
      shuffle: Whether each epoch has its own order; False keeps that of `rows`.
      shards: Which parts of each global batch are served here, in order.
      num_shards: Into how many equal parts batches are divided.

    Attributes:
      batches_per_epoch: Batches in one pass.
      num_batches: Batches in all passes; None for no end.
      served: Batches served so far.

    Raises:
      UserError: `batch_size` is not divisible by `num_shards`, or not positive.
    """

    def __init__(
        self,
        rows: Rows,
        batch_size: int,
        *,
        seed: int = 0,
        num_epochs: int | None = 1,
        shuffle: bool = True,
        shards: Sequence[int] = (0,),
        num_shards: int = 1,
    ):
        if batch_size < 1 or batch_size % num_shards:
            below = batch_size - batch_size % num_shards
            usable = [str(n) for n in (below, below + num_shards) if n > 0]
            raise UserError(
                f"batch size {batch_size} is not divisible by {num_shards} "
                f"parts; use {' or '.join(usable)}"
            )
        self._rows = rows
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._shards = shards
        self._shard_size = batch_size // num_shards
        self.batches_per_epoch = -(-len(rows) // batch_size)
        self.num_batches = (
            None if num_epochs is None else num_epochs * self.batches_per_epoch
        )
        self.served = 0

    @property
    def epoch(self) -> float:
        """Passes over the rows so far, with fraction."""
        return self.served / max(self.batches_per_epoch, 1)

    def state(self) -> dict[str, int]:
        """What `restore` needs to continue after the last batch served."""
        return {"served": self.served, **self._identity()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken, on any number of processes.

        Raises:
          UserError: The data, the batch size or the seed are not those of `state`.
        """
        for name, now in self._identity().items():
            if int(state[name]) != now:
                raise UserError(
                    f"the checkpoint's data order has {name} = {int(state[name])}, "
                    f"this run has {now}; resume with the same data and settings"
                )
        self.served = int(state["served"])

    def _identity(self) -> dict[str, int]:
        return {
            "rows": len(self._rows),
            "tokens": int(self._rows.lengths.sum()),
            "batch_size": self._batch_size,
            "seed": self._seed,
        }

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches(self.served):
            self.served += 1
            yield batch

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Serves batches from number `start` to the end, leaving the state alone.

        Yields:
          int32 [B / num_shards * len(shards), T] arrays `input_ids`, `labels`,
          `positions` and `segment_ids`. T is the same on every process.
        """
        import grain

        # A range of Python's own largest size stands for "no end".
        stop = 2**62 if self.num_batches is None else self.num_batches
        if start >= stop or not len(self._rows):
            return
        numbers = grain.MapDataset.range(start, stop).map(self.assemble)
        yield from numbers.to_iter_dataset(
            grain.ReadOptions(
                num_threads=_THREADS, prefetch_buffer_size=_PREFETCHED_BATCHES
            )
        )

    def assemble(self, number: int) -> Batch:
        """Builds this process's part of global batch `number`."""
        indices = self.choose_rows(number)
        length = self._rows.choose_length(indices)
        size, seed = self._shard_size, (self._seed, number // self.batches_per_epoch)
        # What an epoch's last batch lacks, it lacks at its end.
        here = [indices[shard * size : (shard + 1) * size] for shard in self._shards]
        rows = np.concatenate(here)
        return self._rows.assemble(rows, size * len(here), length, seed)

    def choose_rows(self, number: int) -> np.ndarray:
        """The rows of global batch `number`, over all processes; O(batch size)."""
        epoch, batch = divmod(number, self.batches_per_epoch)
        first = batch * self._batch_size
        places = range(first, min(first + self._batch_size, len(self._rows)))
        if not self._shuffle:
            return np.array(places, np.int64)
        from grain.experimental import index_shuffle

        seed = int(np.random.SeedSequence((self._seed, epoch)).generate_state(1)[0])
        last = len(self._rows) - 1
        return np.array(
            [index_shuffle(p, last, seed, _SHUFFLE_ROUNDS) for p in places], np.int64
        )

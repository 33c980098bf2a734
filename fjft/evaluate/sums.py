"""Evaluation as streaming sums: its memory does not grow with the data."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from fjft.distributed import fetch


class Tally:
    """Adds up an evaluation, batch by batch, on the host.

    This one takes sums as they are. Others make sums of what single examples gave.

    Args:
      examples: What is judged, `data.examples.Examples`.
      config: The objective's options.
    """

    def __init__(self, examples: Any = None, config: Any = None):
        del examples, config
        self._total: Any = None

    def add(self, judged: Any) -> None:
        """Adds what an objective's `evaluate` gave for a batch, in host memory."""
        sums = jax.tree.map(lambda x: np.asarray(x, np.float64), judged)
        if self._total is not None:
            sums = jax.tree.map(np.add, self._total, sums)
        self._total = sums

    def result(self) -> Any:
        """The sums over all batches, as float64 arrays; None if there were none."""
        return self._total


def add_up(
    eval_step: Callable[[Any], Any],
    batches: Iterable[Any],
    tally: Tally | None = None,
    writer: Any = None,
) -> Any:
    """Sums over all batches, so that batch sizes do not matter.

    Args:
      eval_step: Batch -> what the tally adds, on the device.
      batches: Batches, already on the devices.
      tally: What adds up; None if the step gives sums.
      writer: A `predictions.Writer`, which is told too; or None.

    Returns:
      The tally's result.
    """
    tally = tally or Tally()

    def add(judged: Any) -> None:
        fetched = fetch(judged)
        tally.add(fetched)
        if writer is not None:
            writer.add(fetched)

    pending = None
    for batch in batches:
        # The next batch is sent off before the last one's numbers are waited for.
        pending, done = eval_step(batch), pending
        if done is not None:
            add(done)
    if pending is not None:
        add(pending)
    return tally.result()

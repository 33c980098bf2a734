"""Evaluation as streaming sums: its memory does not grow with the data."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np


def add_up(eval_step: Callable[[Any], Any], batches: Iterable[Any]) -> Any:
    """Sums over all batches, so that batch sizes do not matter.

    Args:
      eval_step: Batch -> a pytree of sums, on the device.
      batches: Batches, already on the devices.

    Returns:
      The same pytree with float64 numpy arrays; None if there are no batches.
    """
    total = pending = None
    for batch in batches:
        # The next batch is sent off before the last one's sums are waited for.
        pending, done = eval_step(batch), pending
        total = _add(total, done)
    return _add(total, pending)


def _add(total: Any, sums: Any) -> Any:
    if sums is None:
        return total
    sums = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(sums))
    return sums if total is None else jax.tree.map(np.add, total, sums)

"""Loss, perplexity and token accuracy of held-out text, as streaming sums."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax


def evaluate_sums(
    eval_step: Callable[[Any], Any], batches: Iterable[Any]
) -> dict[str, float]:
    """Sums over all batches and divides once, so batch sizes do not matter.

    Args:
      eval_step: Batch -> sums with `loss`, `weight` and `correct`, on the device.
      batches: Batches, already on the devices.

    Returns:
      `eval_loss` (nats a token), `eval_perplexity`, `eval_mean_token_accuracy` and
      `eval_num_tokens` (tokens judged).
    """
    loss = weight = correct = 0.0
    pending = None
    for batch in batches:
        # The next batch is sent off before the last one's sums are waited for.
        pending, done = eval_step(batch), pending
        if done is not None:
            loss, weight, correct = _add(done, loss, weight, correct)
    if pending is not None:
        loss, weight, correct = _add(pending, loss, weight, correct)
    mean = loss / max(weight, 1)
    return {
        "eval_loss": mean,
        "eval_perplexity": math.exp(min(mean, 700.0)),
        "eval_mean_token_accuracy": correct / max(weight, 1),
        "eval_num_tokens": weight,
    }


def _add(
    sums: Any, loss: float, weight: float, correct: float
) -> tuple[float, float, float]:
    sums = jax.device_get(sums)
    return (
        loss + float(sums.loss),
        weight + float(sums.weight),
        correct + float(sums.correct),
    )

"""Loss, perplexity and token accuracy of text."""

import math
from typing import Any

from fjft.evaluate.sums import Tally

__all__ = ["Tally", "of", "report", "summarize", "summarize_training"]


def summarize(sums: Any) -> dict[str, float]:
    """Metrics of an evaluation.

    Args:
      sums: `loss`, `weight` and `correct` over all of it.

    Returns:
      `loss` (nats a token), `perplexity`, `mean_token_accuracy` and `num_tokens`
      (tokens judged).
    """
    mean = float(sums.loss) / max(float(sums.weight), 1)
    return {
        "loss": mean,
        "perplexity": of(mean),
        "mean_token_accuracy": float(sums.correct) / max(float(sums.weight), 1),
        "num_tokens": float(sums.weight),
    }


def of(loss: float) -> float:
    """The perplexity of a mean loss in nats; finite whatever that is."""
    return math.exp(min(loss, 700.0))


def summarize_training(loss: float, weight: float, correct: float) -> dict[str, float]:
    """The same of the steps since the last log line, from sums over their tokens."""
    return {"loss": loss / weight, "mean_token_accuracy": correct / weight}


def report(sums: Any, names: tuple[str, ...]) -> str:
    """There is nothing to say beyond the numbers."""
    del sums, names
    return ""

"""Loss, perplexity and error rate of predicted hidden tokens."""

from typing import Any

from fjft.evaluate import perplexity
from fjft.evaluate.perplexity import Tally, report

__all__ = ["Tally", "report", "summarize", "summarize_training"]


def summarize(sums: Any) -> dict[str, float]:
    """Metrics of an evaluation.

    Args:
      sums: `loss`, `weight` and `correct` over all of it.

    Returns:
      `loss` (nats a hidden token), `perplexity`, `masked_token_error_rate` (the share
      of hidden tokens predicted wrongly) and `num_masked_tokens`.
    """
    found = perplexity.summarize(sums)
    return {
        "loss": found["loss"],
        "perplexity": found["perplexity"],
        "masked_token_error_rate": 1 - found["mean_token_accuracy"],
        "num_masked_tokens": found["num_tokens"],
    }


def summarize_training(loss: float, weight: float, correct: float) -> dict[str, float]:
    """The same of the steps since the last log line, from sums over their tokens."""
    return {
        "loss": loss / weight,
        "perplexity": perplexity.of(loss / weight),
        "masked_token_error_rate": 1 - correct / weight,
    }

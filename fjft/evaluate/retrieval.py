"""How well vectors of texts find what belongs together, within each batch."""

from typing import Any

from fjft.evaluate.perplexity import report
from fjft.evaluate.sums import Tally

__all__ = ["Tally", "report", "summarize", "summarize_training"]


def summarize(sums: Any) -> dict[str, float]:
    """Metrics of an evaluation.

    Args:
      sums: `objectives.contrastive.Ranked` over all of it.

    Returns:
      `loss`; `accuracy`, the share of anchors that are nearest to their own text;
      `mrr`, the mean of the inverse of its rank; and `num_anchors`. All depend on how
      many texts a batch has.
    """
    anchors = max(float(sums.weight), 1)
    return {
        "loss": float(sums.loss) / anchors,
        "accuracy": float(sums.correct) / anchors,
        "mrr": float(sums.reciprocal_ranks) / anchors,
        "num_anchors": float(sums.weight),
    }


def summarize_training(loss: float, weight: float, correct: float) -> dict[str, float]:
    """Loss and accuracy of the steps since the last log line."""
    return {"loss": loss / weight, "accuracy": correct / weight}

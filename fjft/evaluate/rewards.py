"""How much more a model rewards chosen answers than rejected ones."""

from typing import Any

from fjft.evaluate.perplexity import report
from fjft.evaluate.sums import Tally

__all__ = ["Tally", "report", "summarize", "summarize_training"]


def summarize(sums: Any) -> dict[str, float]:
    """Metrics of an evaluation, under trl's names.

    Args:
      sums: `objectives.preferred.Preferred` over all of it.

    Returns:
      `loss`; `rewards/accuracies`, the share of pairs whose chosen answer has the
      higher reward; the means `rewards/chosen`, `rewards/rejected` and
      `rewards/margins`; and `num_pairs`.
    """
    pairs = max(float(sums.weight), 1)
    chosen, rejected = float(sums.chosen) / pairs, float(sums.rejected) / pairs
    return {
        "loss": float(sums.loss) / pairs,
        "rewards/accuracies": float(sums.correct) / pairs,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "num_pairs": float(sums.weight),
    }


def summarize_training(loss: float, weight: float, correct: float) -> dict[str, float]:
    """Loss and accuracy of the steps since the last log line."""
    return {"loss": loss / weight, "rewards/accuracies": correct / weight}

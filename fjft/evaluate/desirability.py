"""How much more a model rewards desirable answers than undesirable ones."""

from typing import Any

from fjft.evaluate.perplexity import report
from fjft.evaluate.rewards import summarize_training
from fjft.evaluate.sums import Tally

__all__ = ["Tally", "report", "summarize", "summarize_training"]


def summarize(sums: Any) -> dict[str, float]:
    """Metrics of an evaluation, under trl's names where it has them.

    Args:
      sums: `objectives.kto.Judged` over all of it.

    Returns:
      `loss`; `rewards/accuracies`, the share of answers whose reward lies on their side
      of the reference point; the means `rewards/chosen` of desirable answers and
      `rewards/rejected` of undesirable ones, and `rewards/margins`, all three 0 where
      there are none; `kl` in nats; and `num_answers`.
    """
    answers = max(float(sums.weight), 1)
    chosen = float(sums.desirable) / max(float(sums.num_desirable), 1)
    rejected = float(sums.undesirable) / max(float(sums.num_undesirable), 1)
    return {
        "loss": float(sums.loss) / answers,
        "rewards/accuracies": float(sums.correct) / answers,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "kl": float(sums.kl) / answers,
        "num_answers": float(sums.weight),
    }

"""How much more a model rewards chosen answers, and how far it went for that."""

from typing import Any

from fjft.evaluate import rewards
from fjft.evaluate.rewards import Tally, report, summarize_training

__all__ = ["Tally", "report", "summarize", "summarize_training"]


def summarize(sums: Any) -> dict[str, float]:
    """Metrics of an evaluation.

    Args:
      sums: `objectives.dpo.Judged` over all of it.

    Returns:
      What `rewards.summarize` does, and `kl`: the mean of KL(model || reference), in
      nats, of the next token over both answers of all pairs.
    """
    kl = float(sums.kl) / max(float(sums.num_tokens), 1)
    return rewards.summarize(sums) | {"kl": kl}

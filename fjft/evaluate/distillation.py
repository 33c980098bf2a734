"""How well a model predicts text, and how far it is from its teacher."""

from typing import Any

from fjft.evaluate import perplexity
from fjft.evaluate.perplexity import Tally, report, summarize_training

__all__ = ["Tally", "report", "summarize", "summarize_training"]


def summarize(sums: Any) -> dict[str, float]:
    """Metrics of an evaluation.

    Args:
      sums: `objectives.divergence.Distilled` over all of it.

    Returns:
      `loss`, the mixed one; `cross_entropy` and `divergence` from the teacher, each in
      nats a token; `perplexity`, `mean_token_accuracy` and `num_tokens`.
    """
    tokens = max(float(sums.weight), 1)
    cross_entropy = float(sums.cross_entropy) / tokens
    return perplexity.summarize(sums) | {
        "cross_entropy": cross_entropy,
        "divergence": float(sums.divergence) / tokens,
        "perplexity": perplexity.of(cross_entropy),
    }

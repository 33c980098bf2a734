"""Which step was the best so far, and whether it pays to go on."""

from collections.abc import Mapping

from fjft.training.progress import Progress

# Ends of the names of metrics that are the better the less they are.
_LESS_IS_BETTER = ("loss", "perplexity", "error_rate", "mse", "mae", "rejected")


def is_less_better(metric: str) -> bool:
    """Whether a metric of this name is the better the less it is."""
    return metric.endswith(_LESS_IS_BETTER)


def compare(
    progress: Progress, metrics: Mapping[str, float], metric: str, threshold: float
) -> None:
    """Compares an evaluation of the step that a run has come to with the best so far.

    As in transformers an evaluation is the best if it is better at all; but only one
    that is better by more than the threshold shows that training still helps.

    Args:
      progress: Where the run stands; what is known of the best is brought up to date.
      metrics: What the evaluation found.
      metric: The one that counts.
      threshold: By how much it must be better to count as a gain.
    """
    gain = float("inf")
    if metric in progress.best_metrics:
        gain = metrics[metric] - progress.best_metrics[metric]
        if is_less_better(metric):
            gain = -gain
    if gain > threshold:
        progress.evaluations_without_gain = 0
    else:
        progress.evaluations_without_gain += 1
    if gain > 0:
        progress.best_step, progress.best_metrics = progress.step, dict(metrics)

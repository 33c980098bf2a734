"""Metrics of labelled texts, all of them scikit-learn's or scipy's own numbers.

They follow from counts alone: each cell of a confusion matrix stands for that many
equal examples, which scikit-learn takes as one example of that weight.
"""

import math
import re
from typing import Any

import numpy as np

from fjft.evaluate.sums import Tally

__all__ = ["Tally", "report", "summarize", "summarize_training"]


def summarize(sums: Any) -> dict[str, float]:
    """Metrics of an evaluation.

    Args:
      sums: `objectives.sequence_classification.Judged` over all of it.

    Returns:
      `loss` and `num_examples`. For labels `accuracy` (all of an example's labels are
      right), `f1_macro` and `f1_micro`; for numbers `mse`, `mae`, `pearson` and `r2`,
      each the mean over the outputs.
    """
    found = {"loss": float(sums.loss) / max(float(sums.weight), 1)}
    counts = np.asarray(sums.counts)
    if counts.shape[1:] == (8,):
        found |= _summarize_numbers(counts)
    else:
        found["accuracy"] = float(sums.exact) / max(float(sums.examples), 1)
        from sklearn.metrics import f1_score

        true, said, weights = _as_examples(counts)
        for average in ("macro", "micro"):
            found[f"f1_{average}"] = float(
                f1_score(
                    true,
                    said,
                    average=average,
                    sample_weight=weights,
                    zero_division=0.0,  # pyright: ignore[reportArgumentType]
                )
            )
    return found | {"num_examples": float(sums.examples)}


def summarize_training(loss: float, weight: float, correct: float) -> dict[str, float]:
    """Loss and accuracy of the steps since the last log line, as their weights count.

    Of numbers the accuracy is 0.
    """
    return {"loss": loss / weight, "accuracy": correct / weight}


def report(sums: Any, names: tuple[str, ...]) -> str:
    """scikit-learn's `classification_report`; "" for numbers.

    Args:
      sums: As in `summarize`.
      names: The labels in the order of their ids.
    """
    counts = np.asarray(sums.counts)
    if counts.shape[1:] == (8,):
        return ""
    from sklearn.metrics import classification_report

    true, said, weights = _as_examples(counts)
    text = classification_report(
        true,
        said,
        labels=np.arange(len(names)),
        target_names=names,
        sample_weight=weights,
        digits=4,
        zero_division=0.0,  # pyright: ignore[reportArgumentType]
    )
    assert isinstance(text, str)
    # Weights turn its counts into 21.0, which are 21 when there are none.
    return re.sub(r"(\d+)\.0$", r"  \1", text, flags=re.MULTILINE)


def _as_examples(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True and predicted labels, and weights, of examples with these counts.

    Of several labels each is counted for itself, so an example has only one of them:
    present, truly or said, or neither.
    """
    if counts.ndim == 2:
        true, said = np.nonzero(counts)
        return true, said, counts[true, said]
    label, is_true, is_said = np.nonzero(counts)
    eye = np.eye(len(counts), dtype=int)[label]
    return (
        eye * is_true[:, None],
        eye * is_said[:, None],
        counts[counts != 0].astype(int),
    )


def _summarize_numbers(moments: np.ndarray) -> dict[str, float]:
    n, squares, sizes, x, y, xx, yy, xy = moments.T
    spread_x, spread_y = xx - x * x / n, yy - y * y / n
    with np.errstate(divide="ignore", invalid="ignore"):
        pearson = (xy - x * y / n) / np.sqrt(spread_x * spread_y)
        r2 = 1 - squares / spread_x
    values = {"mse": squares / n, "mae": sizes / n, "pearson": pearson, "r2": r2}
    means = {name: float(np.mean(value)) for name, value in values.items()}
    # Where nothing varies, there is no correlation to speak of.
    return {name: mean if math.isfinite(mean) else 0.0 for name, mean in means.items()}

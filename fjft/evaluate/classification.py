"""Metrics of labelled texts, all of them scikit-learn's or scipy's own numbers.

They follow from counts alone: each cell of a confusion matrix stands for that many
equal examples, which scikit-learn takes as one example of that weight.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from fjft.evaluate import sums
from fjft.evaluate.predictions import Decode
from fjft.labels import IGNORED


class Counts(NamedTuple):
    """What adds up.

    Attributes:
      loss: As in `objectives.cross_entropy.Sums`; so the next.
      weight: As in `Sums`.
      counts: Of single labels [C, C], how often each (row) was taken for each
        (column). Of several, [C, 2, 2], how often each was absent or present (row)
        and was said to be (column). Of numbers, [C, 8]: how many, the sums of errors'
        squares and sizes, of targets, outputs, their squares and their product.
      exact: Examples with all labels right; 0 for numbers.
      examples: Labelled examples.
    """

    loss: np.ndarray
    weight: np.ndarray
    counts: np.ndarray
    exact: int
    examples: int


class Tally(sums.Tally):
    """Counts examples, batch by batch; see `sums.Tally`."""

    def add(self, judged: Any) -> None:
        """Adds `objectives.sequence_classification.Judged` of a batch."""
        outputs, labels, size = judged.outputs, judged.labels, judged.outputs.shape[-1]
        first = labels if labels.ndim == 2 else labels[..., 0]
        is_labelled = ~np.isnan(first) if labels.dtype.kind == "f" else first != IGNORED
        true, said = labels[is_labelled], _say(outputs[is_labelled], labels)
        if labels.dtype.kind == "f":
            x, y = true.astype(np.float64), said.astype(np.float64)
            error = x - y
            sizes = (np.ones_like(x), error**2, abs(error), x, y, x * x, y * y, x * y)
            counts = np.stack(sizes, axis=-1).sum(axis=0)
        elif labels.ndim == 2:
            counts = np.zeros((size, size))
            np.add.at(counts, (true, said), 1)
        else:
            counts = np.zeros((size, 2, 2))
            np.add.at(counts, (np.arange(size), true, said), 1)
        is_exact = (true == said).reshape(len(true), -1).all(axis=-1)
        exact = 0 if labels.dtype.kind == "f" else int(is_exact.sum())
        super().add(Counts(judged.loss, judged.weight, counts, exact, len(true)))


class Predictions:
    """What each text is labelled with, and by the model; see `predictions.Writer`."""

    def __init__(self, examples: Any, config: Any, decode: Decode):
        del config
        self._names = examples.labels.names
        self._decode = decode

    def read(self, judged: Any, examples: Iterator[Any]) -> Iterator[dict[str, Any]]:
        """Reads `objectives.sequence_classification.Judged`."""
        outputs, labels = judged.outputs[:, 0], judged.labels[:, 0]
        all_said = _say(outputs, judged.labels)
        for output, said, true, example in zip(
            outputs, all_said, labels, examples, strict=False
        ):
            text = self._decode(example.columns["input_ids"].tolist())
            told: dict[str, Any] = {
                "text": text,
                "label": self._tell(true),
                "prediction": self._tell(said),
            }
            if true.dtype.kind != "f":
                told["scores"] = dict(
                    zip(self._names, _scores(output, true), strict=True)
                )
            yield told

    def _tell(self, target: np.ndarray) -> Any:
        if target.dtype.kind == "f":
            return dict(zip(self._names, map(float, target), strict=True))
        if target.ndim == 0:
            return self._names[target]
        return [self._names[i] for i in np.flatnonzero(target)]


def _say(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The labels that a head's outputs [..., C] mean, in the form of the true ones."""
    if labels.dtype.kind == "f":
        return outputs
    return outputs.argmax(-1) if labels.ndim == 2 else (outputs > 0).astype(np.int64)


def _scores(output: np.ndarray, target: np.ndarray) -> list[float]:
    """The probability of each label: of one that is right, or each for itself."""
    if target.ndim:
        return (1 / (1 + np.exp(-output.astype(np.float64)))).tolist()
    powers = np.exp(output.astype(np.float64) - output.max())
    return (powers / powers.sum()).tolist()


def summarize(sums: Any) -> dict[str, float]:
    """Metrics of an evaluation.

    Args:
      sums: `Counts` over all of it.

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

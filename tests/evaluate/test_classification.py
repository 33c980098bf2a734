"""Metrics from counts equal scikit-learn's and scipy's from the examples."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from fjft.evaluate import classification
from fjft.evaluate.sums import add_up
from fjft.objectives import sequence_classification as objective

NAMES = ("bad", "good", "so-so", "never")
LIKE_OURS: dict[str, Any] = {"target_names": NAMES, "digits": 4, "zero_division": 0}

TOKENS = ("input_ids", "positions", "segment_ids")


class Given:
    """A model whose logits are in its batch."""

    def __init__(self, logits):
        self.logits = logits

    def encode(self, *args, **kwargs):
        """Nothing."""

    def predict(self, *args, **kwargs):
        """The logits."""
        return self.logits


def judge(logits, labels, batch_size=7):
    """Sums over batches, the last of which is partly empty."""

    def step(first):
        y = labels[first : first + batch_size]
        x = logits[first : first + batch_size]
        missing = batch_size - len(y)
        filler = np.nan if labels.dtype.kind == "f" else -100
        pad = ((0, missing),) + ((0, 0),) * (labels.ndim - 1)
        y = np.pad(y, pad, constant_values=filler)
        x = np.pad(x, ((0, missing), (0, 0)))
        batch = {"labels": jnp.asarray(y[:, None])}
        batch |= {n: jnp.zeros((1, 1), jnp.int32) for n in TOKENS}
        model = Given(jnp.asarray(x[:, None]))
        return objective.evaluate(model, batch, objective.Config())

    batches = range(0, len(labels), batch_size)
    return add_up(step, batches, classification.Tally())


@pytest.fixture
def random():
    return np.random.default_rng(0)


def test_single_labels(random):
    labels = random.integers(0, 3, 40).astype(np.int32)
    logits = random.standard_normal((40, 4)).astype(np.float32)
    logits[:, 3] -= 9
    logits[np.arange(20), labels[:20]] += 3
    sums, said = judge(logits, labels), logits.argmax(-1)
    found = classification.summarize(sums)
    assert found["accuracy"] == sklearn.metrics.accuracy_score(labels, said)
    for average in ("macro", "micro"):
        expected = sklearn.metrics.f1_score(labels, said, average=average)
        assert found[f"f1_{average}"] == pytest.approx(expected, rel=1e-12)
    loss = sklearn.metrics.log_loss(labels, _softmax(logits), labels=range(4))
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["num_examples"] == 40
    assert classification.report(sums, NAMES) == sklearn.metrics.classification_report(
        labels, said, labels=range(4), **LIKE_OURS
    )


def test_several_labels(random):
    labels = random.integers(0, 2, (40, 4)).astype(np.int32)
    logits = random.standard_normal((40, 4)).astype(np.float32)
    logits[:20] += 2 * labels[:20] - 1
    logits[:4] = 2 * labels[:4] - 1
    sums, said = judge(logits, labels), (logits > 0).astype(int)
    found = classification.summarize(sums)
    assert found["accuracy"] == sklearn.metrics.accuracy_score(labels, said) > 0
    for average in ("macro", "micro"):
        expected = sklearn.metrics.f1_score(labels, said, average=average)
        assert found[f"f1_{average}"] == pytest.approx(expected, rel=1e-12)
    expected = sklearn.metrics.classification_report(labels, said, **LIKE_OURS)
    assert isinstance(expected, str)
    # An average over examples does not follow from counts of labels.
    ours = classification.report(sums, NAMES).splitlines()
    assert [line for line in ours if "samples avg" not in line] == [
        line for line in expected.splitlines() if "samples avg" not in line
    ]


def test_numbers(random):
    targets = random.standard_normal((40, 2)).astype(np.float32)
    outputs = (targets + random.standard_normal((40, 2)) / 2).astype(np.float32)
    sums = judge(outputs, targets)
    found = classification.summarize(sums)
    metrics = sklearn.metrics
    expected = {
        "loss": metrics.mean_squared_error(targets, outputs),
        "mse": metrics.mean_squared_error(targets, outputs),
        "mae": metrics.mean_absolute_error(targets, outputs),
        "r2": metrics.r2_score(targets, outputs),
        "pearson": np.mean(
            [
                scipy.stats.pearsonr(targets[:, i], outputs[:, i]).correlation
                for i in range(2)
            ]
        ),
        "num_examples": 40,
    }
    assert found == pytest.approx(expected, rel=1e-5)
    assert classification.report(sums, ("x", "y")) == ""


def test_nothing_varies():
    sums = judge(np.ones((3, 1), np.float32), np.ones((3, 1), np.float32))
    found = classification.summarize(sums)
    assert (found["pearson"], found["r2"], found["mse"]) == (0, 0, 0)


def _softmax(logits):
    e = np.exp(logits.astype(np.float64))
    return e / e.sum(-1, keepdims=True)

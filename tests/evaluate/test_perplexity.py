"""Streaming sums of an evaluation."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from fjft.evaluate.perplexity import summarize
from fjft.evaluate.sums import add_up
from fjft.objectives.cross_entropy import Sums


def sums(loss: float, weight: float, correct: float) -> Sums:
    """What an eval step gives for a batch."""
    return Sums(*(jnp.float32(v) for v in (loss, weight, correct)))


def test_sums_are_divided_once():
    """Batches of 10, 1 and 4 tokens: a mean of means would be 2.5."""
    batches = [sums(10, 10, 5), sums(4, 1, 0), sums(10, 4, 4)]
    found = summarize(add_up(lambda batch: batch, iter(batches)))
    assert found == {
        "loss": 24 / 15,
        "perplexity": math.exp(24 / 15),
        "mean_token_accuracy": 9 / 15,
        "num_tokens": 15,
    }


def test_nothing_and_overflow_do_not_raise():
    assert add_up(lambda batch: batch, []) is None
    found = summarize(sums(1e5, 1, 0))
    assert math.isfinite(found["perplexity"])


def test_many_batches_lose_no_digits():
    """Sums are float64 on the host: ten thousand float32 sums would drift."""
    batches = [sums(0.1 * 3000, 3000, 0)] * 10_000
    found = summarize(add_up(lambda batch: batch, batches))
    assert found["loss"] == pytest.approx(float(np.float32(300)) / 3000, rel=1e-12)

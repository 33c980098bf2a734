"""Streaming sums of an evaluation."""

import math
import types

import numpy as np
import pytest

from fjft.evaluate.perplexity import evaluate_sums


def sums(loss: float, weight: float, correct: float) -> types.SimpleNamespace:
    """What an eval step gives for a batch."""
    named = {"loss": loss, "weight": weight, "correct": correct}
    return types.SimpleNamespace(**{k: np.float32(v) for k, v in named.items()})


def test_sums_are_divided_once():
    """Batches of 10, 1 and 4 tokens: a mean of means would be 2.5."""
    batches = [sums(10, 10, 5), sums(4, 1, 0), sums(10, 4, 4)]
    found = evaluate_sums(lambda batch: batch, iter(batches))
    assert found == {
        "eval_loss": 24 / 15,
        "eval_perplexity": math.exp(24 / 15),
        "eval_mean_token_accuracy": 9 / 15,
        "eval_num_tokens": 15,
    }


def test_nothing_and_overflow_do_not_raise():
    assert evaluate_sums(lambda batch: batch, [])["eval_num_tokens"] == 0
    found = evaluate_sums(lambda batch: batch, [sums(1e5, 1, 0)])
    assert math.isfinite(found["eval_perplexity"])


def test_many_batches_lose_no_digits():
    """Sums are float64 on the host: ten thousand float32 sums would drift."""
    batches = [sums(0.1 * 3000, 3000, 0)] * 10_000
    found = evaluate_sums(lambda batch: batch, batches)
    assert found["eval_loss"] == pytest.approx(float(np.float32(300)) / 3000, rel=1e-12)

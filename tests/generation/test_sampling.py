"""Sampling against transformers' logits processors and against probabilities."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from fjft.generation.sampling import kept, sample

# The 99.9 % quantile of chi-square with 7 degrees of freedom.
CHI_SQUARE_LIMIT = 24.3


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 7, 300, 1000])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999, 1.0])
def test_kept_sets_equal_transformers(temperature, top_k, top_p):
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(6, 300)) * [[0.1], [1], [3], [3], [10], [30]]).astype(
        np.float32
    )
    scores: Any = torch.tensor(logits)
    no_ids: Any = None
    processors = [TemperatureLogitsWarper(temperature)]
    processors += [TopKLogitsWarper(top_k)] if top_k else []
    processors += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    for process in processors:
        scores = process(no_ids, scores)
    ours = jax.jit(kept)(logits / np.float32(temperature), top_k=top_k, top_p=top_p)
    np.testing.assert_array_equal(ours, torch.isfinite(scores).numpy())


def test_the_token_that_crosses_top_p_stays():
    scores = jnp.log(jnp.array([[0.15, 0.5, 0.05, 0.3]]))
    assert kept(scores, top_k=0, top_p=0.6).tolist() == [[False, True, False, True]]
    assert kept(scores, top_k=0, top_p=0.4).tolist() == [[False, True, False, False]]


def test_temperature_zero_is_argmax_in_float32():
    logits = jnp.array([[1.0, 3.0, 2.0], [5.0, 3.0, 5.0]], jnp.bfloat16)
    tokens = sample(logits, jax.random.key(0), temperature=0.0, top_k=2, top_p=0.5)
    assert tokens.tolist() == [1, 0]
    assert tokens.dtype == jnp.int32


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.5, 6, 0.8)]
)
def test_draws_follow_the_probabilities(temperature, top_k, top_p):
    logits = np.random.default_rng(1).normal(size=(1, 8)).astype(np.float32)
    num_draws = 40_000
    keep = kept(jnp.array(logits / temperature), top_k=top_k, top_p=top_p)
    probs = np.where(keep, np.exp(logits / temperature), 0)[0]
    probs /= probs.sum()
    tokens = sample(
        jnp.broadcast_to(logits, (num_draws, 8)),
        jax.random.key(3),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    counts = np.bincount(tokens, minlength=8)
    assert counts[probs == 0].sum() == 0
    expected = probs[probs > 0] * num_draws
    chi_square = np.sum((counts[probs > 0] - expected) ** 2 / expected)
    assert chi_square < CHI_SQUARE_LIMIT


def test_a_row_draws_the_same_whatever_rows_follow():
    logits = jax.random.normal(jax.random.key(0), (8, 50))
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    all_rows = sample(logits, jax.random.key(1), **options)
    some_rows = sample(logits[:3], jax.random.key(1), **options)
    np.testing.assert_array_equal(all_rows[:3], some_rows)

"""Entities are found, counted and reported as seqeval does."""

import types
import warnings

import numpy as np
import pytest
import seqeval.metrics

from fjft.evaluate import entities
from fjft.objectives.token_classification import Judged

# Every letter, and two types: what breaks the rules too.
NAMES = ("O", *(f"{letter}-{kind}" for letter in "BIES" for kind in ("LOC", "PER")))


def make_batches():
    """Tags at random: batches of packed texts, each with some words not labelled."""
    random = np.random.default_rng(0)
    for _ in range(3):
        said, true = random.integers(0, len(NAMES), (2, 4, 32), np.int32)
        said = np.where(random.random(said.shape) < 0.6, true, said)
        labels = np.where(random.random(true.shape) < 0.3, -100, true)
        segments = np.repeat([[1, 2, 3, 0]], 4, axis=0).repeat(8, axis=1)
        labels = np.where(segments == 0, -100, labels)
        yield Judged(np.float32(2), np.float32(4), said, labels, segments)  # type: ignore[arg-type]


def add_up(names):
    labels = types.SimpleNamespace(names=names)
    tally = entities.Tally(types.SimpleNamespace(labels=labels))
    for batch in make_batches():
        tally.add(batch)
    return tally.result()


def as_texts(which):
    """What seqeval takes: the tags of each text's words."""
    return [
        [NAMES[tag] for tag in getattr(batch, which)[row, here]]
        for batch in make_batches()
        for row in range(4)
        for here in [
            (batch.segment_ids[row] == s) & (batch.labels[row] >= 0) for s in (1, 2, 3)
        ]
    ]


def test_scores_and_report_are_seqevals():
    total = add_up(NAMES)
    true, said = as_texts("labels"), as_texts("said")
    found = entities.summarize(total)
    for name in ("precision", "recall", "f1", "accuracy"):
        theirs = getattr(seqeval.metrics, f"{name}_score")(true, said)
        assert found[name] == pytest.approx(theirs, rel=1e-12)
        assert 0.1 < theirs < 0.9
    assert found["loss"] == 0.5
    assert found["num_words"] == sum(map(len, true))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = seqeval.metrics.classification_report(true, said, digits=4)
    assert entities.report(total, NAMES) == theirs


def test_tags_without_entities_have_an_accuracy():
    total = add_up(tuple(name.replace("-", "_") for name in NAMES))
    found = entities.summarize(total)
    assert found["f1"] == 0
    assert found["accuracy"] == entities.summarize(add_up(NAMES))["accuracy"]
    assert entities.report(total, ("NOUN", "VERB")) == ""

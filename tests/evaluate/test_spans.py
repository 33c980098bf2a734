"""Answers in windows: the best pair of logits, and SQuAD's own two numbers."""

import json
import types

import numpy as np
import pytest

from fjft.evaluate import spans
from fjft.objectives.question_answering import Config, Judged

WORDS = ["the", "cat", "sat", "on", "a", "red", "mat", "and", "slept", "there"]
CONTEXT = " ".join(WORDS)


def make_note(question, windows, first_word, num_words, answers=("red mat",)):
    words = WORDS[first_word : first_word + num_words]
    ends = np.cumsum([len(word) + 1 for word in words]) - 1
    offsets = [[int(e) - len(w), int(e)] for e, w in zip(ends, words, strict=True)]
    note = {"question": question, "windows": windows, "answers": answers}
    note |= {"first": 3, "context": " ".join(words), "offsets": offsets}
    return json.dumps(note)


@pytest.mark.parametrize("longest", [1, 3, 30])
def test_the_answer_is_the_best_of_all_pairs(longest):
    window = json.loads(make_note(0, 1, 0, 10))
    config = Config(n_best_size=14, max_answer_length=longest)
    for seed in range(20):
        logits = np.random.default_rng(seed).standard_normal((14, 2)).astype(np.float32)
        pairs = [
            (logits[i, 0] + logits[j, 1], " ".join(WORDS[i - 3 : j - 2]))
            for i in range(3, 13)
            for j in range(i, min(i + longest, 13))
        ]
        score, text = max(pairs)
        assert spans.find_answer(logits, window, config) == (pytest.approx(score), text)


def test_few_starts_may_have_no_end():
    logits = np.zeros((14, 2), np.float32)
    logits[12, 0] = logits[3, 1] = 1
    window = json.loads(make_note(0, 1, 0, 10))
    assert spans.find_answer(logits, window, Config(n_best_size=1))[1] == ""


@pytest.mark.parametrize(
    ("said", "right", "exact", "f1"),
    [
        ("The red  Mat!", "red mat", 1, 1),
        ("a red mat", "mat", 0, 2 / 3),
        ("red red mat", "red mat mat", 0, 2 / 3),
        ("cat", "mat", 0, 0),
        ("", "mat", 0, 0),
        ("the", "a", 1, 1),
    ],
)
def test_exact_match_and_f1(said, right, exact, f1):
    assert spans.exact_match(said, right) == exact
    assert spans.word_f1(said, right) == pytest.approx(f1)


def test_the_best_window_answers_whatever_batches_hold():
    """Two questions; the second has two windows, in different batches."""
    notes = [make_note(0, 1, 0, 10), make_note(1, 2, 0, 5), make_note(1, 2, 4, 6)]
    logits = np.zeros((3, 1, 14, 2), np.float32)
    logits[0, 0, 3 + 1, 0] = logits[0, 0, 3 + 1, 1] = 5  # "cat"
    logits[1, 0, 3 + 1, 0] = logits[1, 0, 3 + 1, 1] = 5  # "cat"
    logits[2, 0, 3 + 1, 0] = logits[2, 0, 3 + 2, 1] = 6  # "red mat"
    for order in ([0, 1, 2], [2, 0, 1]):
        tally = spans.Tally(types.SimpleNamespace(notes=notes), Config())
        for example in order:
            tally.add(
                Judged(
                    np.float32(3),  # type: ignore[arg-type]
                    np.float32(1),  # type: ignore[arg-type]
                    logits[example],  # type: ignore[arg-type]
                    np.ones((1, 14), np.int32),  # type: ignore[arg-type]
                    np.array([[example, -1]], np.int32),  # type: ignore[arg-type]
                )
            )
        found = spans.summarize(tally.result())
        assert found == {"loss": 3, "exact_match": 50, "f1": 50, "num_questions": 2}

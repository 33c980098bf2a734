"""Texts that were written, compared with the right ones."""

import difflib
import random
from typing import Any

import numpy as np
import pytest

from fjft.evaluate import sequences
from fjft.objectives.seq2seq import Judged

END = 1


def _judge(written, labels):
    tally = sequences.Tally()
    sums: list[Any] = [6.0, 3.0, 2.0, np.array(written), np.array(labels)]
    tally.add(Judged(*sums))
    return sequences.summarize(tally.result())


def test_texts_are_compared_up_to_the_token_that_ends_them():
    found = _judge(
        [[5, 6, END, 9], [5, 7, 7, 7], [8, END, 0, 0]],
        [[5, 6, END, -100], [5, 6, 7, END], [-100] * 4],
    )
    assert found["loss"] == 2.0
    assert found["num_texts"] == 2  # the last row is padding
    assert found["exact_match"] == 50
    # Of `5 7 7 7` and `5 6 7`: two in common, and 6 and a 7 to be mended.
    assert found["token_f1"] == pytest.approx(100 * (1 + 2 * 2 / 7) / 2)
    assert found["token_error_rate"] == pytest.approx(100 * 2 / 5)


def test_nothing_is_said_of_texts_that_were_not_written():
    assert "exact_match" not in _judge(np.zeros((1, 0), int), [[5, END]])


def test_edits_are_as_few_as_can_be():
    assert sequences.edit_distance([], [1, 2]) == 2
    kitten, sitting = (list(map(ord, word)) for word in ("kitten", "sitting"))
    assert sequences.edit_distance(kitten, sitting) == 3
    draw = random.Random(0)
    for _ in range(20):
        said, right = (draw.choices(range(4), k=draw.randrange(8)) for _ in "ab")
        distance = sequences.edit_distance(said, right)
        assert distance == sequences.edit_distance(right, said)
        blocks = difflib.SequenceMatcher(None, said, right).get_matching_blocks()
        kept = sum(block.size for block in blocks)
        assert abs(len(said) - len(right)) <= distance
        assert distance <= len(said) + len(right) - 2 * kept

"""Texts that were written, compared with the right ones."""

import difflib
import random
import tracemalloc

import pytest
import rouge_score.rouge_scorer
import rouge_score.scoring
import sacrebleu

from fjft.errors import UserError
from fjft.evaluate import sequences
from fjft.evaluate.overlap import make_metrics

PAIRS = [
    ("the cat sat on the mat", "the cat is sitting on the mat"),
    ("", "nothing was written of this one"),
    ("Line one.\nIt rains, in Spain!", "Line one.\nThe rain in Spain, it falls."),
    ("她喜欢猫。", "她很喜欢猫。"),
]


def _judge(pairs, names=()):
    tally = sequences.Tally(make_metrics(names))
    for said, right in pairs:
        tokens, right_tokens = (list(map(ord, text)) for text in (said, right))
        tally.add(sequences.Written(tokens, right_tokens, said, right))
    return tally.result()


def test_texts_are_compared_token_by_token():
    found = _judge([("ab", "ab"), ("acccc", "abc")])
    assert found["num_texts"] == 2
    assert found["exact_match"] == 50
    # Of `acccc` and `abc`: two in common, and a c and two more to be mended.
    assert found["token_f1"] == pytest.approx(100 * (1 + 2 * 2 / 8) / 2)
    assert found["token_error_rate"] == pytest.approx(100 * 3 / 5)


def test_scores_of_texts_are_their_libraries_own():
    found = _judge(PAIRS, ("bleu", "chrf", "rouge"))
    said, right = map(list, zip(*PAIRS, strict=True))
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(said, [right]).score)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(said, [right]).score)
    names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = rouge_score.rouge_scorer.RougeScorer(names)
    aggregator = rouge_score.scoring.BootstrapAggregator(n_samples=1)
    for a, b in PAIRS:
        aggregator.add_scores(scorer.score(b, a))
    # The middle of its interval is drawn; the mean that it lies around is ours.
    scores = aggregator._scores
    for name in names:
        mean = sum(score.fmeasure for score in scores[name]) / len(PAIRS)
        assert found[name] == pytest.approx(100 * mean)
    assert 0 < found["bleu"] < found["chrf"] < 100


def test_memory_does_not_grow_with_the_texts():
    def measure(repeats):
        tally = sequences.Tally(make_metrics(("bleu", "chrf", "rouge")))
        tracemalloc.start()
        for number in range(100 * repeats):
            # Of few texts, since sacrebleu remembers the words of those it has seen.
            text = f"{number % 5} is a number"
            tally.add(sequences.Written([number], [number], text, text * 2))
        (size, _), _ = tracemalloc.get_traced_memory(), tracemalloc.stop()
        return size

    measure(1)  # imports, and what they keep
    small, large = measure(1), measure(20)
    assert large < 2 * small


def test_a_metric_whose_library_is_not_there_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(UserError, match=r"text_metrics=rouge .* \"fjft\[metrics\]\""):
        make_metrics(["rouge"])


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

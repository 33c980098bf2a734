"""Answers found in texts: SQuAD's exact match and F1 (Rajpurkar et al. 2016)."""

import json
import math
import re
import string
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fjft.evaluate import sums
from fjft.evaluate.perplexity import report
from fjft.evaluate.predictions import Decode

__all__ = ["Predictions", "Tally", "report", "summarize", "summarize_training"]


class Counts(NamedTuple):
    """What adds up.

    Attributes:
      loss: As in `objectives.cross_entropy.Sums`; so the next.
      weight: As in `Sums`.
      exact: Questions whose answer is one of the right ones.
      f1: Sum over questions of the words' F1.
      questions: How many.
    """

    loss: float
    weight: float
    exact: float
    f1: float
    questions: float


class Tally(sums.Tally):
    """Answers each question when all of its windows are there; see `sums.Tally`."""

    def __init__(self, examples: Any, config: Any):
        super().__init__(examples, config)
        self._answers = Answers(examples.notes, config)

    def add(self, judged: Any) -> None:
        """Adds `objectives.question_answering.Judged` of a batch."""
        exact = f1 = questions = 0.0
        for found in self._answers.read(judged):
            if found is None:
                continue
            window, answer = found
            exact += max(exact_match(answer, right) for right in window["answers"])
            f1 += max(word_f1(answer, right) for right in window["answers"])
            questions += 1
        super().add(Counts(judged.loss, judged.weight, exact, f1, questions))


class Answers:
    """Finds the answer of each question in all of its windows.

    Args:
      notes: Of the examples, by their number; see `data.questions.Encoder`.
      config: As in `find_answer`.
    """

    def __init__(self, notes: Any, config: Any):
        self._notes = notes
        self._config = config
        # Question -> how many windows were seen, and the best score with its answer.
        self._open: dict[int, tuple[int, tuple[float, str]]] = {}

    def read(self, judged: Any) -> Iterator[tuple[dict[str, Any], str] | None]:
        """Reads `objectives.question_answering.Judged` of a batch.

        Yields:
          For each window None, or with a question's last one its note and the answer.
        """
        for row, segment in zip(*np.nonzero(judged.examples >= 0), strict=True):
            window = json.loads(self._notes[judged.examples[row, segment]])
            here = judged.segment_ids[row] == segment + 1
            found = find_answer(judged.logits[row, here], window, self._config)
            seen, best = self._open.pop(window["question"], (0, (-math.inf, "")))
            best = max(best, found, key=lambda scored: scored[0])
            if seen + 1 < window["windows"]:
                self._open[window["question"]] = seen + 1, best
                yield None
            else:
                yield window, best[1]


class Predictions:
    """Each question, its answers and the model's; see `predictions.Writer`."""

    def __init__(self, examples: Any, config: Any, decode: Decode):
        self._answers = Answers(examples.notes, config)
        self._decode = decode

    def read(
        self, judged: Any, examples: Iterator[Any]
    ) -> Iterator[dict[str, Any] | None]:
        """Reads `objectives.question_answering.Judged`."""
        for found, example in zip(self._answers.read(judged), examples, strict=False):
            if found is None:
                yield None
                continue
            window, answer = found
            # What stands before a window's part of the context.
            asked = example.columns["input_ids"][: window["first"]].tolist()
            yield {
                "question": self._decode(asked),
                "context": window["context"],
                "answers": window["answers"],
                "prediction": answer,
            }


def find_answer(
    logits_TC: np.ndarray, window: dict[str, Any], config: Any
) -> tuple[float, str]:
    """The best answer in a window and its score, the sum of two logits.

    Args:
      logits_TC: [T, 2], of a start and an end at each of its tokens.
      window: Its note; see `data.questions.Encoder`.
      config: `n_best_size` and `max_answer_length` are used.
    """
    starts, ends = (np.argsort(-x)[: config.n_best_size] for x in logits_TC.T)
    scores = logits_TC[starts, 0][:, None] + logits_TC[ends, 1][None, :]
    first, offsets = window["first"], window["offsets"]
    is_in, is_in_too = (
        (x >= first) & (x < first + len(offsets)) for x in (starts, ends)
    )
    lengths = ends[None, :] - starts[:, None] + 1
    is_answer = is_in[:, None] & is_in_too[None, :]
    is_answer &= (lengths > 0) & (lengths <= config.max_answer_length)
    if not is_answer.any():
        return -math.inf, ""
    scores = np.where(is_answer, scores, -np.inf)
    start, end = np.unravel_index(np.argmax(scores), scores.shape)
    begin, stop = offsets[starts[start] - first][0], offsets[ends[end] - first][1]
    return float(scores[start, end]), window["context"][begin:stop]


def normalize(text: str) -> list[str]:
    """Its words in lower case, without articles and punctuation."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def exact_match(said: str, right: str) -> float:
    """1 if both have the same words, else 0."""
    return float(normalize(said) == normalize(right))


def word_f1(said: str, right: str) -> float:
    """F1 of the words that both have."""
    return overlap_f1(normalize(said), normalize(right))


def overlap_f1(said: Sequence[Hashable], right: Sequence[Hashable]) -> float:
    """F1 of the words or tokens that both have."""
    if not said or not right:
        return float(said == right)
    common = (Counter(said) & Counter(right)).total()
    return 2 * common / (len(said) + len(right))


def summarize(sums: Any) -> dict[str, float]:
    """Metrics of an evaluation.

    Args:
      sums: `Counts` over all of it.

    Returns:
      `loss`; `exact_match` and `f1` in percent, and `num_questions`.
    """
    questions = max(float(sums.questions), 1)
    return {
        "loss": float(sums.loss) / max(float(sums.weight), 1),
        "exact_match": 100 * float(sums.exact) / questions,
        "f1": 100 * float(sums.f1) / questions,
        "num_questions": float(sums.questions),
    }


def summarize_training(loss: float, weight: float, correct: float) -> dict[str, float]:
    """Loss, and the share of windows of which start and end are right."""
    return {"loss": loss / weight, "accuracy": correct / weight}

"""Texts that a model wrote, held against those that it should have written.

They are compared token by token, so that nothing depends on how words are told apart;
and as texts, where other metrics are asked for.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fjft.evaluate.overlap import Metric
from fjft.evaluate.spans import overlap_f1


class Written(NamedTuple):
    """A text, and what it should have been; without the tokens that end them.

    Attributes:
      said: Its tokens.
      right: The right ones.
      said_text: What its tokens read.
      right_text: What the right ones read.
    """

    said: list[int]
    right: list[int]
    said_text: str
    right_text: str


class Tally:
    """Adds up comparisons, text by text.

    Args:
      metrics: Those of texts.

    Attributes:
      num_texts: How many were compared.
    """

    def __init__(self, metrics: Sequence[Metric] = ()):
        self._metrics = metrics
        self.num_texts = 0
        # Texts right to the last token, sum of F1, edits, and tokens of right texts.
        self._sums = np.zeros(4)

    def add(self, written: Written) -> None:
        """Compares one more."""
        said, right = written.said, written.right
        f1, edits = overlap_f1(said, right), edit_distance(said, right)
        self.num_texts += 1
        self._sums += said == right, f1, edits, len(right)
        for metric in self._metrics:
            metric.add(written.said_text, written.right_text)

    def result(self) -> dict[str, float]:
        """Metrics of all texts, of which there is at least one.

        Returns:
          `exact_match` and `token_f1`, in percent, `token_error_rate` (edits for each
          right token, in percent), `num_texts`, and what the metrics of texts say.
        """
        exact, f1, edits, tokens = self._sums.tolist()
        found = {
            "exact_match": 100 * exact / self.num_texts,
            "token_f1": 100 * f1 / self.num_texts,
            "token_error_rate": 100 * edits / max(tokens, 1),
            "num_texts": float(self.num_texts),
        }
        for metric in self._metrics:
            found |= metric.result()
        return found


def edit_distance(said: list[int], right: list[int]) -> int:
    """The fewest insertions, deletions and substitutions (Levenshtein 1966)."""
    row = np.arange(len(right) + 1)
    places, ids = row.copy(), np.array(right, np.int64)
    for number, token in enumerate(said, 1):
        best = np.minimum(row[1:] + 1, row[:-1] + (ids != token))
        # Insertions go from left to right, one for each place.
        row = np.minimum.accumulate(np.append(number, best) - places) + places
    return int(row[-1])

"""Texts that a model wrote, held against those that it should have written.

They are compared token by token, so that nothing depends on how words are told apart.
"""

from typing import Any, NamedTuple

import numpy as np

from fjft.evaluate import perplexity, sums
from fjft.evaluate.perplexity import report, summarize_training
from fjft.evaluate.spans import overlap_f1
from fjft.labels import IGNORED

__all__ = ["Tally", "report", "summarize", "summarize_training"]


class Counts(NamedTuple):
    """What adds up.

    Attributes:
      loss: As in `objectives.cross_entropy.Sums`; so the next two.
      weight: As in `Sums`.
      correct: As in `Sums`.
      exact: Texts that are right to the last token.
      f1: Sum over texts of the tokens' F1.
      edits: Tokens to be put in, left out or exchanged to make all texts right.
      tokens: Of the right texts.
      texts: How many were written.
    """

    loss: float
    weight: float
    correct: float
    exact: float
    f1: float
    edits: float
    tokens: float
    texts: float


class Tally(sums.Tally):
    """Compares text by text; see `sums.Tally`."""

    def add(self, judged: Any) -> None:
        """Adds `objectives.seq2seq.Judged` of a batch."""
        exact = f1 = edits = tokens = texts = 0.0
        for written, labels in zip(judged.written, judged.labels, strict=True):
            right = labels[labels != IGNORED].tolist()
            if not right or not written.size:
                continue
            # Both end where the right one's last token stands, which ends texts.
            said, right = _up_to(written.tolist(), right[-1]), right[:-1]
            exact += said == right
            f1 += overlap_f1(said, right)
            edits += edit_distance(said, right)
            tokens += len(right)
            texts += 1
        added = judged.loss, judged.weight, judged.correct
        super().add(Counts(*added, exact, f1, edits, tokens, texts))


def _up_to(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens


def edit_distance(said: list[int], right: list[int]) -> int:
    """The fewest insertions, deletions and substitutions (Levenshtein 1966)."""
    row = np.arange(len(right) + 1)
    places, ids = row.copy(), np.array(right, np.int64)
    for number, token in enumerate(said, 1):
        best = np.minimum(row[1:] + 1, row[:-1] + (ids != token))
        # Insertions go from left to right, one for each place.
        row = np.minimum.accumulate(np.append(number, best) - places) + places
    return int(row[-1])


def summarize(sums: Any) -> dict[str, float]:
    """Metrics of an evaluation.

    Args:
      sums: `Counts` over all of it.

    Returns:
      What `perplexity` says of the right tokens, each predicted from the right ones
      before it. If texts were written also `exact_match` and `token_f1`, in percent,
      `token_error_rate` (edits for each right token, in percent) and `num_texts`.
    """
    found = perplexity.summarize(sums)
    texts = float(sums.texts)
    if not texts:
        return found
    return found | {
        "exact_match": 100 * float(sums.exact) / texts,
        "token_f1": 100 * float(sums.f1) / texts,
        "token_error_rate": 100 * float(sums.edits) / max(float(sums.tokens), 1),
        "num_texts": texts,
    }

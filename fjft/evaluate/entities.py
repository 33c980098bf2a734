"""Metrics of tagged words: seqeval's precision, recall and F1 of whole entities.

A tag is `O`, or a letter and a type: `B-PER`. An entity's words have its type and begin
with B, go on with I, end with E, or are one word with S. As in seqeval (and conlleval),
what breaks these rules begins an entity too: `I-PER` after `O` does.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from fjft.evaluate import sums
from fjft.evaluate.predictions import Decode


class Counts(NamedTuple):
    """What adds up.

    Attributes:
      loss: As in `objectives.cross_entropy.Sums`; so the next.
      weight: As in `Sums`.
      correct: Words whose tag is right.
      words: Words that have a tag.
      entities: [types, 3]: found rightly, found, and there to be found.
    """

    loss: np.ndarray
    weight: np.ndarray
    correct: np.ndarray
    words: np.ndarray
    entities: np.ndarray


class Tags:
    """What the names of tags say.

    Attributes:
      types: The types of entities, sorted.
    """

    def __init__(self, names: tuple[str, ...]):
        # The last entry stands for what is between texts, -1.
        parts = [name.split("-", 1) for name in (*names, "O")]
        kinds = [part[1] if len(part) == 2 else "" for part in parts]
        self.types = tuple(sorted(set(kinds) - {""}))
        self._letters = np.array([part[0] if len(part) == 2 else "O" for part in parts])
        self._kinds = np.array([self.types.index(k) if k else -1 for k in kinds])

    def find_entities(self, tags: np.ndarray) -> set[tuple[int, int, int]]:
        """The entities of texts: the type's number, the first word and the next one's.

        Args:
          tags: [words], the ids of tags, and -1 between texts.
        """
        tags = np.append(tags, -1)
        letters, kinds = self._letters[tags], self._kinds[tags]
        before = np.roll(letters, 1)
        is_inside = letters != "O"
        is_new = np.isin(letters, ("B", "S")) | np.isin(before, ("E", "S", "O"))
        is_new |= kinds != np.roll(kinds, 1)
        starts = np.flatnonzero(is_inside & is_new)
        edges = np.flatnonzero(is_new | ~is_inside)
        ends = edges[np.searchsorted(edges, starts, "right")]
        found = np.stack([kinds[starts], starts, ends], axis=1)
        return set(map(tuple, found.tolist()))


class Tally(sums.Tally):
    """Counts entities, batch by batch; see `sums.Tally`."""

    def __init__(self, examples: Any, config: Any = None):
        super().__init__(examples, config)
        self._tags = Tags(examples.labels.names)

    def add(self, judged: Any) -> None:
        """Adds `objectives.token_classification.Judged` of a batch."""
        is_word = judged.labels >= 0
        rows, places = np.nonzero(is_word)
        said, true = judged.said[is_word], judged.labels[is_word]
        texts = np.stack([rows, judged.segment_ids[rows, places]])
        (edges,) = np.nonzero(np.any(np.diff(texts, axis=1), axis=0))
        found, there = (
            self._tags.find_entities(np.insert(tags, edges + 1, -1))
            for tags in (said, true)
        )
        counts = [
            np.bincount([kind for kind, _, _ in which], minlength=len(self._tags.types))
            for which in (found & there, found, there)
        ]
        super().add(
            Counts(
                judged.loss,
                judged.weight,
                np.sum(said == true),
                np.sum(is_word),
                np.stack(counts, axis=1),
            )
        )


class Predictions:
    """Each text's words, their tags and the model's; see `predictions.Writer`."""

    def __init__(self, examples: Any, config: Any, decode: Decode):
        del config
        self._names = examples.labels.names
        self._decode = decode

    def read(self, judged: Any, examples: Iterator[Any]) -> Iterator[dict[str, Any]]:
        """Reads `objectives.token_classification.Judged`."""
        for said, example in zip(judged.said, examples, strict=False):
            ids, labels = (example.columns[name] for name in ("input_ids", "labels"))
            # A word is its first token, which has the tag, and those that go on.
            (starts,) = np.nonzero(labels >= 0)
            words = [self._decode(part.tolist()) for part in np.split(ids, starts)[1:]]
            yield {
                "words": [word.strip() for word in words],
                "tags": [self._names[i] for i in labels[starts]],
                "prediction": [self._names[i] for i in said[starts]],
            }


def summarize(sums: Any) -> dict[str, float]:
    """Metrics of an evaluation.

    Args:
      sums: `Counts` over all of it.

    Returns:
      `loss`; `precision`, `recall` and `f1` of all entities; `accuracy` of all words,
      and `num_words`.
    """
    precision, recall, f1 = _scores(sums.entities.sum(axis=0))
    return {
        "loss": float(sums.loss) / max(float(sums.weight), 1),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "accuracy": float(sums.correct) / max(float(sums.words), 1),
        "num_words": float(sums.words),
    }


def summarize_training(loss: float, weight: float, correct: float) -> dict[str, float]:
    """Loss and accuracy of words since the last log line, as their weights count."""
    return {"loss": loss / weight, "accuracy": correct / weight}


def report(sums: Any, names: tuple[str, ...]) -> str:
    """Seqeval's `classification_report`; "" where no tag is of an entity.

    Args:
      sums: `Counts` over all of it.
      names: The tags in the order of their ids.
    """
    types, support = Tags(names).types, sums.entities[:, 2].astype(int)
    present = np.flatnonzero(sums.entities[:, 1:].any(axis=1))
    if not len(present):
        return ""
    scores = np.array([_scores(sums.entities[i]) for i in present])
    weights = support[present] if support.any() else None
    averages = {
        "micro avg": _scores(sums.entities.sum(axis=0)),
        "macro avg": scores.mean(axis=0),
        "weighted avg": np.average(scores, axis=0, weights=weights),
    }
    width = max(len(name) for name in (*(types[i] for i in present), *averages))
    row = f"{{:>{width}s}}  {' '.join(['{:>9.4f}'] * 3)} {{:>9}}"
    head = " ".join(
        f"{name:>9}" for name in ("precision", "recall", "f1-score", "support")
    )
    lines = [f"{'':{width}}  {head}", ""]
    lines += [
        row.format(types[i], *each, support[i])
        for i, each in zip(present, scores, strict=True)
    ]
    lines.append("")
    lines += [row.format(name, *each, support.sum()) for name, each in averages.items()]
    return "\n".join(lines) + "\n"


def _scores(counts: np.ndarray) -> tuple[float, float, float]:
    right, found, there = map(float, counts)
    precision, recall = right / max(found, 1), right / max(there, 1)
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return precision, recall, f1

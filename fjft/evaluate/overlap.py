"""Metrics of texts by what they have in common: sacreBLEU, chrF and ROUGE.

Their own libraries count, text by text; what is kept is sums, so that memory does not
grow with the texts (sacrebleu itself remembers the words of the last 65,536 at most).
All are in percent.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from fjft.errors import UserError


class Metric(Protocol):
    """Adds up what texts have in common."""

    def add(self, said: str, right: str) -> None:
        """Adds a text, and what it should have been."""
        ...

    def result(self) -> Mapping[str, float]:
        """The metrics of all texts, by name."""
        ...


class Sacre:
    """A metric of sacrebleu, of a whole corpus: it follows from sums of counts.

    Args:
      name: `bleu` (Papineni et al. 2002, as in Post 2018) or `chrf` (Popović 2015).
    """

    def __init__(self, name: str):
        metrics = _import("sacrebleu.metrics", name)
        self._name = name
        self._metric = {"bleu": metrics.BLEU, "chrf": metrics.CHRF}[name]()
        self._counts: Any = 0

    def add(self, said: str, right: str) -> None:
        """See `Metric`."""
        (counts,) = self._metric._extract_corpus_statistics([said], [[right]])
        self._counts = self._counts + np.array(counts)

    def result(self) -> dict[str, float]:
        """See `Metric`."""
        score = self._metric._aggregate_and_compute([self._counts.tolist()])
        return {self._name: score.score}


class Rouge:
    """The mean F of words, pairs of words and common subsequences (Lin 2004).

    Words are what rouge-score takes for them: of Latin letters and digits, not stemmed.
    `rougeLsum` takes each line for a sentence.

    Args:
      name: Of the metric, for a message.
    """

    def __init__(self, name: str):
        scorer = _import("rouge_score.rouge_scorer", name)
        self._sums = dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum"), 0.0)
        self._scorer = scorer.RougeScorer(list(self._sums))
        self._texts = 0

    def add(self, said: str, right: str) -> None:
        """See `Metric`."""
        for name, score in self._scorer.score(right, said).items():
            self._sums[name] += score.fmeasure
        self._texts += 1

    def result(self) -> dict[str, float]:
        """See `Metric`."""
        return {name: 100 * total / self._texts for name, total in self._sums.items()}


METRICS: dict[str, Callable[[str], Metric]] = {
    "bleu": Sacre,
    "chrf": Sacre,
    "rouge": Rouge,
}


def make_metrics(names: Sequence[str]) -> list[Metric]:
    """Makes these metrics, keys of `METRICS`.

    Raises:
      UserError: A library is not installed.
    """
    return [METRICS[name](name) for name in names]


def _import(module: str, metric: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"evaluate.text_metrics={metric} needs {module.partition('.')[0]}, which "
            'is not installed; pip install "fjft[metrics]"'
        ) from error

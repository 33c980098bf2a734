"""Reads rows and makes examples of them, with an account of what became of each."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from fjft.data import kept
from fjft.data.config import Config
from fjft.data.examples import Draw, Encoded, Example, Examples, Labels, Spool
from fjft.data.files import Row
from fjft.data.instructions import Instructions
from fjft.data.report import Report
from fjft.data.sources import list_specs, read_rows
from fjft.data.templates import MalformedError
from fjft.errors import UserError

# Rows rendered and tokenized together: enough to keep the tokenizer's threads busy.
_ROWS_AT_ONCE = 1024


class Encoder(Protocol):
    """What makes examples out of rows; each kind has a module in `encoders`.

    Attributes:
      columns: Names of its examples' columns.
      labels: What its examples are labelled with; None if nothing.
      draw: What each epoch draws anew of an example; None if nothing.
      num_parts: Texts that an example is made of, each a segment of its own.
      generates: Whether the model learns to write, and so needs to learn to stop.
    """

    columns: tuple[str, ...]
    labels: Labels | None
    draw: Draw | None
    num_parts: int
    generates: bool

    def read(self, values: dict[str, Any]) -> tuple[str, Any]:
        """A row's format and what it says; or raises `MalformedError`."""
        ...

    def encode(self, samples: list[Any]) -> list[Encoded]:
        """Tokenizes what `read` gave, in order."""
        ...


class Sampled(NamedTuple):
    """A row that has been read.

    Attributes:
      number: The row's, from 0 over all sources.
      source: The name of its source, "" if it has none.
      place: Where it stands, for a message.
      format: What it was recognised as, "" if it could not be read.
      sample: What it says, or the reason why it cannot be used.
    """

    number: int
    source: str
    place: str
    format: str
    sample: Any


class Reader:
    """Makes examples of a config's rows.

    Args:
      config: The data section.
      encoder: What makes examples of what rows say.
      tokenizer: The encoder's.
      seed: Chooses each row's instruction.

    Raises:
      UserError: A template of an instruction is broken.
    """

    def __init__(self, config: Config, encoder: Encoder, tokenizer: Any, seed: int):
        self._encoder = encoder
        self._strict = config.strict
        self._sample_by = config.sample_by
        self._instructions = Instructions(config, seed)
        self._keeper = kept.Keeper(config, tokenizer, encoder.labels, seed)

    def read(self, sources: Mapping[str, Any], split: str) -> Iterator[Sampled]:
        """Reads the rows of sources, one source after the other."""
        number = itertools.count()
        for name, specs in sources.items():
            for row in read_rows(specs, split, self._sample_by):
                yield self._read_row(next(number), name, row)

    def _read_row(self, number: int, source: str, row: Row) -> Sampled:
        try:
            if row.error is not None:
                raise MalformedError(row.error)
            template = self._instructions.choose(source, number)
            values = row.values if template is None else template.fill(row.values)
            name, sample = self._encoder.read(values)
        except MalformedError as error:
            return Sampled(number, source, row.place, "", error)
        name = name if template is None else template.name
        return Sampled(number, source, row.place, name, sample)

    def make_examples(
        self,
        sources: Mapping[str, Any],
        option: str,
        show: Callable[[Sampled], Any] | None = None,
        numbers: set[int] | None = None,
    ) -> tuple[Examples, Report]:
        """Reads and tokenizes sources.

        Args:
          sources: Where they are, by name.
          option: Of which these are the value: `train`, `eval` or `eval.NAME`.
          show: A row -> its sample with what is shown before it; None shows nothing.
          numbers: Of the rows to use; None is all.

        Raises:
          UserError: As `dataset.load_examples`.
        """
        rows = self.read(sources, "test" if option.startswith("eval") else "train")
        if show is not None or numbers is not None:
            chosen = (r for r in rows if numbers is None or r.number in numbers)
            shown = chosen if show is None else (_change(r, show) for r in chosen)
            return self._tokenize(shown, sources, option)
        place = self._keeper.find_place(sources, option)
        encoder = self._encoder
        found = place and kept.load(place, encoder.columns, encoder.labels)
        if found:
            return found
        started = time.perf_counter()
        examples, report = self._tokenize(rows, sources, option)
        if place and time.perf_counter() - started >= kept.MIN_SECONDS:
            report = kept.save(place, examples, report)
        return examples, report

    def _tokenize(
        self, rows: Iterator[Sampled], sources: Mapping[str, Any], option: str
    ) -> tuple[Examples, Report]:
        """Makes examples of rows of these sources."""
        encoder = self._encoder
        report = Report(option, strict=self._strict, generates=encoder.generates)
        report.sources.update(dict.fromkeys(sources, 0))
        spool = Spool(columns=encoder.columns, labels=encoder.labels)
        while chunk := list(itertools.islice(rows, _ROWS_AT_ONCE)):
            self._encode(chunk, spool, report)
        examples = spool.finish()
        report.supervised_tokens = int(examples.supervised.sum(dtype=np.int64))
        if not len(examples):
            raise UserError(_explain_empty(report, sources))
        return examples, report

    def _encode(self, rows: list[Sampled], spool: Spool, report: Report) -> None:
        """Encodes what can be, and counts what cannot."""
        samples = [r.sample for r in rows if not isinstance(r.sample, MalformedError)]
        encoded = iter(self._encoder.encode(samples))
        used, numbers = [], []
        for row in rows:
            report.rows_read += 1
            report.sources[row.source] += 1
            if row.format:
                report.formats[row.format] += 1
            is_bad = isinstance(row.sample, MalformedError)
            result: Encoded = row.sample if is_bad else next(encoded)
            if isinstance(result, MalformedError):
                report.reject(row.place, result.reason, result.detail)
                continue
            for example in result if isinstance(result, list) else [result]:
                used.append(example)
                numbers.append(row.number)
                _count(report, example, self._encoder.labels)
        spool.add(used, numbers)


def _change(row: Sampled, show: Callable[[Sampled], Any]) -> Sampled:
    if isinstance(row.sample, MalformedError):
        return row
    try:
        return row._replace(sample=show(row))
    except MalformedError as error:
        return row._replace(sample=error)


def _count(report: Report, example: Example, labels: Labels | None) -> None:
    report.examples += 1
    report.truncated += example.is_truncated
    report.tokens += len(example)
    report.longest = max(report.longest, len(example))
    report.end_tokens.update(example.end_tokens)
    if labels is not None and labels.problem_type != "regression":
        report.labels.update(labels.of(example))


def _explain_empty(report: Report, sources: Mapping[str, Any]) -> str:
    """One sentence on why nothing is left."""
    named = ", ".join(list_specs(sources))
    if not report.rows_read:
        return f"data.{report.name}: {named} holds no rows; name data that has some"
    reason, worst = max(report.rejected.items(), key=lambda item: item[1].count)
    return (
        f"data.{report.name}: none of the {report.rows_read:,} rows of {named} can be "
        f"used; {worst.count:,} of them: {reason} (first: {worst.places[0]})"
    )

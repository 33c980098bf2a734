"""From a config to rows ready to serve: the stages, one after the other."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from fjft.data import tokenize
from fjft.data.config import Config
from fjft.data.examples import Draw, Encoded, Example, Examples, Labels, Spool
from fjft.data.files import Row
from fjft.data.pack import Rows
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


def load_examples(
    config: Config,
    tokenizer: Any,
    seed: int = 0,
    make_encoder: Callable[[Any, Config], Encoder] = tokenize.Encoder,
) -> tuple[Rows, dict[str, Rows], Report]:
    """Reads, tokenizes and packs the training and the evaluation data.

    Args:
      config: The data section.
      tokenizer: A fast Hugging Face tokenizer.
      seed: Chooses which examples `config.eval_size` holds out.
      make_encoder: The `Encoder` of a module in `encoders`.

    Returns:
      Rows for training; rows for evaluation by the name of their set, "" where it has
      none; and the account of what was read.

    Raises:
      UserError: A source cannot be read, nothing is left to train on, or `strict` is
        set and a row cannot be used.
    """
    if not list_specs(config.train):
        raise UserError("data.train is empty; name a file, a package or a dataset")
    encoder = make_encoder(tokenizer, config)
    examples, report = read_examples(config, encoder, config.train, "train")
    sets: dict[str, Examples] = {}
    for name, sources in config.eval_sources.items():
        option = f"eval.{name}" if name else "eval"
        sets[name], part = read_examples(config, encoder, sources, option)
        report.evals.append(part)
    if not sets and config.eval_size:
        examples, sets[""] = hold_out(examples, config.eval_size, seed)
        report.held_out = len(sets[""])
    train, *evaluation = (
        Rows(e, config, encoder.draw, encoder.num_parts)
        for e in (examples, *sets.values())
    )
    # What was held out of the training data has no account of its own.
    accounts = (report, *report.evals)
    for rows, part in zip((train, *evaluation), accounts, strict=False):
        part.packed_rows = 0 if rows.bins is None else len(rows)
        part.efficiency = rows.efficiency
    return train, dict(zip(sets, evaluation, strict=True)), report


def read_examples(
    config: Config, encoder: Encoder, sources: str | Sequence[str], name: str
) -> tuple[Examples, Report]:
    """Reads and tokenizes one of the config's sources.

    Args:
      config: The data section.
      encoder: What makes examples of its rows.
      sources: Where they are.
      name: Of which option these are the value: `train`, `eval` or `eval.NAME`.

    Raises:
      UserError: As `load_examples`.
    """
    report = Report(name, strict=config.strict, generates=encoder.generates)
    spool = Spool(columns=encoder.columns, labels=encoder.labels)
    rows = read_rows(sources, split="train" if name == "train" else "test")
    while chunk := list(itertools.islice(rows, _ROWS_AT_ONCE)):
        first = report.rows_read
        results = _encode_rows(chunk, encoder, report)
        kept, numbers = [], []
        for number, (row, result) in enumerate(
            zip(chunk, results, strict=True), start=first
        ):
            report.rows_read += 1
            if isinstance(result, MalformedError):
                report.reject(row.place, result.reason, result.detail)
                continue
            for example in result if isinstance(result, list) else [result]:
                kept.append(example)
                numbers.append(number)
                _count(report, example, encoder.labels)
        spool.add(kept, numbers)
    examples = spool.finish()
    report.supervised_tokens = int(examples.supervised.sum(dtype=np.int64))
    if not len(examples):
        raise UserError(_explain_empty(report, sources))
    return examples, report


def _encode_rows(rows: list[Row], encoder: Encoder, report: Report) -> list[Encoded]:
    """Encodes what can be; in order, with the reason in place of what cannot."""
    read: list[Any] = []
    for row in rows:
        if row.error is not None:
            read.append(MalformedError(row.error))
            continue
        try:
            name, sample = encoder.read(row.values)
            report.formats[name] += 1
            read.append(sample)
        except MalformedError as error:
            read.append(error)
    samples = [s for s in read if not isinstance(s, MalformedError)]
    encoded = iter(encoder.encode(samples))
    return [s if isinstance(s, MalformedError) else next(encoded) for s in read]


def _count(report: Report, example: Example, labels: Labels | None) -> None:
    report.examples += 1
    report.truncated += example.is_truncated
    report.tokens += len(example)
    report.longest = max(report.longest, len(example))
    report.end_tokens.update(example.end_tokens)
    if labels is not None and labels.problem_type != "regression":
        report.labels.update(labels.of(example))


def _explain_empty(report: Report, sources: str | Sequence[str]) -> str:
    """One sentence on why nothing is left."""
    named = ", ".join(list_specs(sources))
    if not report.rows_read:
        return f"data.{report.name}: {named} holds no rows; name data that has some"
    reason, worst = max(report.rejected.items(), key=lambda item: item[1].count)
    return (
        f"data.{report.name}: none of the {report.rows_read:,} rows of {named} can be "
        f"used; {worst.count:,} of them: {reason} (first: {worst.places[0]})"
    )


def hold_out(examples: Examples, size: float, seed: int) -> tuple[Examples, Examples]:
    """Divides examples into those to train on and those held out, both in order.

    Each source row draws a number that depends on the seed and the row's place only,
    so a change of tokenizer or `max_length` does not move rows across.

    Args:
      examples: All examples.
      size: Fraction held out if below 1, otherwise how many examples.
      seed: Chooses which.

    Raises:
      UserError: Nothing would be left to train on, or nothing is held out.
    """
    draws = _draw(examples.row_numbers, seed)
    if size < 1:
        is_held_out = draws < size
    else:
        # The pieces of a row draw the same number, and stay together.
        is_held_out = draws <= np.sort(draws)[: int(size)].max(initial=-1)
    count = int(is_held_out.sum())
    if count == len(examples) or (size > 0 and count == 0):
        raise UserError(
            f"data.eval_size = {size:g} holds out {count} of {len(examples)} examples;"
            f" use a number of examples from 1 to {len(examples) - 1}"
        )
    indices = np.arange(len(examples))
    return examples.take(indices[~is_held_out]), examples.take(indices[is_held_out])


def _draw(numbers: np.ndarray, seed: int) -> np.ndarray:
    """A float64 in [0, 1) for each row number: splitmix64 of the number and seed."""
    mixed = numbers.astype(np.uint64)
    offset = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
    mixed = (mixed + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + offset
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed = mixed ^ (mixed >> np.uint64(31))
    return (mixed >> np.uint64(11)) * 2.0**-53

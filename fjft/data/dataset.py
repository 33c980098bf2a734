"""From a config to rows ready to serve: the stages, one after the other."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from fjft.data import tokenize
from fjft.data.config import Config
from fjft.data.draws import draw
from fjft.data.examples import Examples
from fjft.data.mixture import by_source, check_sources, mix
from fjft.data.pack import Rows
from fjft.data.reading import Encoder, Reader
from fjft.data.report import Report
from fjft.data.shots import Shots, choose_pool
from fjft.data.sources import list_specs
from fjft.errors import UserError


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
      seed: Chooses which examples `config.eval_size` holds out, each row's instruction,
        what is shown before questions, and what comes again in a mixture.
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
    reader = Reader(config, encoder, tokenizer, seed)
    examples, report = reader.make_examples(config.train_sources, "train")
    if isinstance(config.train, Mapping):
        check_sources(examples, report.sources)
    sets: dict[str, Examples] = {}
    if not config.eval_sources and config.eval_size:
        examples, sets = hold_out(examples, report.sources, config.eval_size, seed)
        report.held_out = sum(map(len, sets.values()))
        examples, report.also_held_out = leave_out_known(examples, sets.values())
    show = None
    if config.eval_shots:
        numbers = choose_pool(examples, report.sources, seed)
        rows = reader.read(config.train_sources, "train")
        pool = [row for row in rows if row.number in numbers]
        show = Shots(pool, config.eval_shots, seed).show
        for name, own in sets.items():
            option = f"train.{name}" if name else "train"
            sets[name], part = reader.make_examples(
                config.train_sources, option, show, set(own.row_numbers.tolist())
            )
            report.evals.append(part)
    for name, sources in config.eval_sources.items():
        option = f"eval.{name}" if name else "eval"
        sets[name], part = reader.make_examples({name: sources}, option, show)
        report.evals.append(part)
    if isinstance(config.train, Mapping):
        examples, report.mixture = mix(
            examples,
            report.sources,
            config.mixture_weights,
            config.mixture_temperature,
            seed,
        )
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


def hold_out(
    examples: Examples, rows: Mapping[str, int], size: float, seed: int
) -> tuple[Examples, dict[str, Examples]]:
    """Divides examples into those to train on and those held out, both in order.

    Each source row draws a number that depends on the seed and the row's place only,
    so a change of tokenizer or `max_length` does not move rows across.

    Args:
      examples: All examples.
      rows: How many rows each source had, used or not.
      size: Fraction held out of each source if below 1, otherwise how many examples.
      seed: Chooses which.

    Returns:
      Those to train on; and those held out, by the name of their source.

    Raises:
      UserError: Nothing would be left of a source to train on, or nothing is held out.
    """
    is_held_out = np.concatenate(
        [
            _choose_held_out(name, own.row_numbers, size, seed)
            for name, own in by_source(examples, rows).items()
        ]
    )
    indices = np.arange(len(examples))
    held_out = examples.take(indices[is_held_out])
    return examples.take(indices[~is_held_out]), by_source(held_out, rows)


def leave_out_known(
    examples: Examples, held_out: Iterable[Examples]
) -> tuple[Examples, int]:
    """Takes away what is held out as well, so that no text is both learned and judged.

    Args:
      examples: To train on.
      held_out: Not to train on.

    Returns:
      The examples whose tokens are not those of a held-out one, and how many are gone.

    Raises:
      UserError: Nothing would be left.
    """
    known = {_fingerprint(own, i) for own in held_out for i in range(len(own))}
    is_new = [_fingerprint(examples, i) not in known for i in range(len(examples))]
    indices = np.flatnonzero(np.array(is_new))
    if not len(indices):
        raise UserError(
            "every example of data.train is held out by data.eval_size as well, since "
            "they repeat one another; set data.eval to a source of its own"
        )
    return examples.take(indices), len(examples) - len(indices)


def _fingerprint(examples: Examples, index: int) -> bytes:
    ids = examples[index].columns["input_ids"]
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


def _choose_held_out(
    source: str, numbers: np.ndarray, size: float, seed: int
) -> np.ndarray:
    draws = draw(numbers, seed)
    if size < 1:
        is_held_out = draws < size
    else:
        # The pieces of a row draw the same number, and stay together.
        is_held_out = draws <= np.sort(draws)[: int(size)].max(initial=-1)
    count = int(is_held_out.sum())
    if count == len(numbers) or count == 0:
        raise UserError(
            f"data.eval_size = {size:g} holds out {count} of {len(numbers)} examples"
            f"{source and f' of data.train.{source}'}; use a number of examples from 1 "
            f"to {len(numbers) - 1}"
        )
    return is_held_out

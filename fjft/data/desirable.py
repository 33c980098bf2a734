"""Answers to prompts, each of which is desirable or is not.

    {"prompt": "2 + 2 = ", "completion": "4", "label": true}
    {"prompt": [{"role": "user", ...}], "completion": [{...}], "label": false}

An example is two texts, each a segment of its own and encoded as in `preferences`: the
prompt with its answer, and the prompt with an answer to another one, which shows how
far a model has gone from its reference. Of three parts that there might be, `parts`
has two: `DESIRABLE` or `UNDESIRABLE`, and `MISMATCHED`.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from fjft.data import tokenize
from fjft.data.config import Config
from fjft.data.examples import Draw, Encoded, Example, Labels, Layout
from fjft.data.preferences import join, show_example
from fjft.data.templates import Chat, MalformedError, Pair, Sample, read_sample
from fjft.data.tokenize import find_labels

__all__ = ["Encoder", "find_labels", "make_layout", "show_example"]

DESIRABLE, UNDESIRABLE, MISMATCHED = range(3)


class Answer(NamedTuple):
    """A prompt with its answer, and which part that is."""

    sample: Sample
    part: int


class Encoder:
    """Turns answers into examples with one tokenizer and one config.

    Args:
      tokenizer: As in `tokenize.Encoder`.
      config: As there, and `label_column`; the two texts share `max_length` in equal
        parts, to which an answer to another prompt is always cut.

    Raises:
      UserError: As there.
    """

    columns: tuple[str, ...] = ("input_ids", "labels", "parts")
    labels: Labels | None = None
    draw: Draw | None = None
    num_parts: int = 3
    generates: bool = True

    def __init__(self, tokenizer: Any, config: Config):
        config = dataclasses.replace(config, max_length=config.max_length // 2)
        self._label_column = config.label_column
        self._own = tokenize.Encoder(tokenizer, config)
        config = dataclasses.replace(config, truncation="truncate")
        self._mismatched = tokenize.Encoder(tokenizer, config)

    def read(self, values: dict[str, Any]) -> tuple[str, Answer]:
        """Reads a row's columns.

        Raises:
          MalformedError: There is no answer to a prompt, or no label of it.
        """
        both = {name: values.get(name) for name in ("prompt", "completion")}
        if None in both.values():
            raise MalformedError(
                "no columns 'prompt' and 'completion'",
                f"it has {', '.join(map(str, values)) or 'none'}",
            )
        label = values.get(self._label_column)
        if label not in (True, False):
            raise MalformedError(
                f"neither true nor false in the column {self._label_column!r}",
                f"it is {label!r}",
            )
        name, part = ("desirable", DESIRABLE) if label else ("undesirable", UNDESIRABLE)
        return name, Answer(read_sample(both)[1], part)

    def encode(self, samples: Sequence[Answer]) -> list[Encoded]:
        """Encodes answers, each to an example or the reason why it cannot be used.

        Raises:
          UserError: As `tokenize.Encoder.encode`.
        """
        own = [answer.sample for answer in samples]
        others = [_mismatch(own, place) for place in range(len(own))]
        mismatched = iter(self._mismatched.encode([o for o in others if o is not None]))
        results: list[Encoded] = []
        for answer, text, other in zip(
            samples, self._own.encode(own), others, strict=True
        ):
            if other is None:
                results.append(MalformedError("no other prompt near it"))
                continue
            example = join({answer.part: text, MISMATCHED: next(mismatched)})
            if isinstance(example, Example) and isinstance(text, Example):
                # What is not learned need not end, and may be cut.
                example = dataclasses.replace(
                    example, end_tokens=text.end_tokens, is_truncated=text.is_truncated
                )
            results.append(example)
        return results


def make_layout(config: Config, has_types: bool, num_labels: int) -> Layout:
    """What batches hold, whatever the arguments."""
    del config, has_types, num_labels
    return Layout(num_parts=Encoder.num_parts, is_numbered=True)


def _mismatch(samples: Sequence[Sample], place: int) -> Sample | None:
    """A sample's prompt with the nearest answer before it, in a ring, to another."""
    own = samples[place]
    ring = itertools.chain(reversed(samples[:place]), reversed(samples[place:]))
    for other in ring:
        if isinstance(own, Pair) and isinstance(other, Pair):
            if own.prompt != other.prompt:
                return Pair(own.prompt, other.completion)
        elif isinstance(own, Chat) and isinstance(other, Chat):
            asked, other_asked = (c.messages[: c.first_answer] for c in (own, other))
            if asked != other_asked:
                answer = other.messages[other.first_answer :]
                return dataclasses.replace(own, messages=asked + answer)
    return None

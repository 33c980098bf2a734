"""Two answers to a prompt, of which one is preferred.

    {"prompt": "2 + 2 = ", "chosen": "4", "rejected": "5"}
    {"prompt": [{"role": "user", ...}], "chosen": [{...}], "rejected": [{...}]}
    {"chosen": [{"role": "user", ...}, {...}], "rejected": [the same, another answer]}

Each answer with its prompt is a segment of its own, and is encoded as any text is that
is to be learned; see `tokenize`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fjft.data import tokenize
from fjft.data.config import Config
from fjft.data.examples import Draw, Encoded, Example, Labels, Layout
from fjft.data.templates import MalformedError, Sample, read_sample
from fjft.data.tokenize import find_labels

__all__ = ["Encoder", "find_labels", "join", "make_layout", "show_example"]


class Encoder:
    """Turns preferences into examples with one tokenizer and one config.

    Args:
      tokenizer: As in `tokenize.Encoder`.
      config: As there; the two texts share `max_length` in equal parts.

    Raises:
      UserError: As there.
    """

    columns: tuple[str, ...] = ("input_ids", "labels", "parts")
    labels: Labels | None = None
    draw: Draw | None = None
    num_parts: int = 2
    generates: bool = True

    def __init__(self, tokenizer: Any, config: Config):
        self._encoder = tokenize.Encoder(
            tokenizer, dataclasses.replace(config, max_length=config.max_length // 2)
        )

    def read(self, values: dict[str, Any]) -> tuple[str, tuple[Sample, Sample]]:
        """Reads a row's columns.

        Raises:
          MalformedError: There are no two answers to one prompt.
        """
        answers = [values.get(name) for name in ("chosen", "rejected")]
        prompt = values.get("prompt")
        if None in answers:
            raise MalformedError(
                "no columns 'chosen' and 'rejected'",
                f"it has {', '.join(map(str, values)) or 'none'}",
            )
        if prompt is None:
            prompt, answers = _find_prompt(*answers)
        chosen, rejected = (
            read_sample({"prompt": prompt, "completion": answer})[1]
            for answer in answers
        )
        return "preference", (chosen, rejected)

    def encode(self, samples: Sequence[tuple[Sample, Sample]]) -> list[Encoded]:
        """Encodes preferences, each to an example or the reason why it cannot be used.

        Raises:
          UserError: As `tokenize.Encoder.encode`.
        """
        encoded = self._encoder.encode([text for pair in samples for text in pair])
        pairs = zip(encoded[::2], encoded[1::2], strict=True)
        return [join(dict(enumerate(pair))) for pair in pairs]


def make_layout(config: Config, has_types: bool, num_labels: int) -> Layout:
    """What batches hold, whatever the arguments."""
    del config, has_types, num_labels
    return Layout(num_parts=Encoder.num_parts, is_numbered=True)


def _find_prompt(chosen: Any, rejected: Any) -> tuple[Any, list[Any]]:
    """The messages that two chats have in common, all but the last."""
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise MalformedError("no column 'prompt'")
    if chosen[:-1] != rejected[:-1]:
        raise MalformedError("chats that differ before their last messages")
    return chosen[:-1], [chosen[-1:], rejected[-1:]]


def join(texts: Mapping[int, Encoded]) -> Encoded:
    """One example of the texts that are these parts, or why one cannot be used."""
    examples: dict[int, Example] = {}
    for part, text in texts.items():
        if not isinstance(text, Example):
            return text
        examples[part] = text
    columns = {
        name: np.concatenate([text.columns[name] for text in examples.values()])
        for name in ("input_ids", "labels")
    }
    lengths = [len(text) for text in examples.values()]
    return Example(
        columns | {"parts": np.repeat(np.array(list(examples), np.int32), lengths)},
        end_tokens=tuple(token for e in examples.values() for token in e.end_tokens),
        is_truncated=any(text.is_truncated for text in examples.values()),
    )


def show_example(tokenizer: Any, example: Example, labels: None = None) -> str:
    """Decodes both texts, a line each, what is learned of them in brackets."""
    del labels
    parts = example.columns["parts"]
    texts = (
        Example({name: x[parts == part] for name, x in example.columns.items()})
        for part in np.unique(parts)
    )
    return "\n".join(tokenize.show_example(tokenizer, text) for text in texts)

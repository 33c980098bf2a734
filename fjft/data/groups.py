"""Texts that belong together: a question and its answer, a text and its translation.

    {"anchor": "What is AI?", "positive": "A branch of computer science."}
    {"anchor": "...", "positive": "...", "negative": "A text of another matter."}

Each text is a segment of its own, with the tokenizer's special tokens around it, and
where it has one, the end of texts. Which
columns are read is for the config to say; if it names none, of a chat the first message
and the answer are, and a prompt and its completion.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fjft.data.config import Config
from fjft.data.examples import Draw, Encoded, Example, Labels, Layout
from fjft.data.labelled import read_text
from fjft.data.sources import list_specs
from fjft.data.templates import Chat, MalformedError, Pair, read_sample
from fjft.data.tokenize import find_labels
from fjft.errors import UserError

__all__ = ["Encoder", "find_labels", "make_layout", "show_example"]


class Encoder:
    """Turns groups of texts into examples with one tokenizer and one config.

    Args:
      tokenizer: A Hugging Face tokenizer of the fast kind.
      config: `text_columns`, `max_length` and `truncation` are used; the texts share
        `max_length` in equal parts.

    Raises:
      UserError: There is one column of text, or more than three.
    """

    columns: tuple[str, ...] = ("input_ids", "parts")
    labels: Labels | None = None
    draw: Draw | None = None
    generates: bool = False

    def __init__(self, tokenizer: Any, config: Config):
        self._text_columns = list_specs(config.text_columns)
        self.num_parts = _count_texts(config)
        if self.num_parts not in (2, 3):
            raise UserError(
                f"data.text_columns is {config.text_columns!r}; name two columns of "
                "texts that belong together, with a comma, and maybe a third of texts "
                "that do not, or none for chats"
            )
        self._tokenizer = tokenizer
        self._is_cut = config.truncation == "truncate"
        self._limit = config.max_length // self.num_parts
        # Decoders' tokenizers do not end texts, at whose ends they are judged.
        end = tokenizer.eos_token_id
        is_ended = end is None or tokenizer("a")["input_ids"][-1] == end
        self._end = [] if is_ended else [end]

    def read(self, values: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
        """Reads a row's texts.

        Raises:
          MalformedError: One is missing or empty.
        """
        if self._text_columns:
            texts = tuple(read_text(values, column) for column in self._text_columns)
            return f"{self.num_parts} texts", texts
        name, sample = read_sample(values)
        if isinstance(sample, Pair):
            return name, (sample.prompt, sample.completion)
        if isinstance(sample, Chat) and len(sample.messages) > 1:
            return name, tuple(str(m["content"]) for m in sample.messages[:2])
        raise MalformedError("a text without an answer")

    def encode(self, samples: Sequence[tuple[str, ...]]) -> list[Encoded]:
        """Encodes groups, each to an example or to the reason why it cannot be used."""
        if not samples:
            return []
        encodings = self._tokenizer(
            [text for texts in samples for text in texts],
            truncation=self._is_cut,
            max_length=self._limit - len(self._end) if self._is_cut else None,
            verbose=False,
        ).encodings
        groups = zip(*[iter(encodings)] * self.num_parts, strict=True)
        return [self._make_example(group) for group in groups]

    def _make_example(self, group: Sequence[Any]) -> Encoded:
        texts = [np.array([*e.ids, *self._end], np.int32) for e in group]
        lengths = [len(text) for text in texts]
        if max(lengths) > self._limit:
            return MalformedError(
                f"a text longer than its part of max_length, {self._limit} tokens",
                f"{max(lengths)} tokens",
            )
        columns = {
            "input_ids": np.concatenate(texts),
            "parts": np.repeat(np.arange(self.num_parts, dtype=np.int32), lengths),
        }
        was_cut = any(encoding.overflowing for encoding in group)
        return Example(columns, is_truncated=was_cut)


def make_layout(config: Config, has_types: bool, num_labels: int) -> Layout:
    """What batches hold; of the arguments, `text_columns` matters."""
    del has_types, num_labels
    return Layout(("input_ids",), num_parts=_count_texts(config), is_numbered=True)


def _count_texts(config: Config) -> int:
    return len(list_specs(config.text_columns)) or 2


def show_example(tokenizer: Any, example: Example, labels: None = None) -> str:
    """Decodes the texts, a line each."""
    del labels
    ids, parts = example.columns["input_ids"], example.columns["parts"]
    return "\n".join(
        tokenizer.decode(ids[parts == part].tolist()) for part in np.unique(parts)
    )

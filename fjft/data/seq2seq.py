"""A text to be read, and another to be written.

    {"source": "two", "target": "T UW1"}

Which columns are read is for the config to say. Both become columns of one example,
side by side from its first token on, and the shorter one is filled up:

    input_ids    t w o </s>        labels    T UW1 </s> -100

so that a packed row's segments hold a source and its target each.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fjft.data.config import Config
from fjft.data.examples import TEXT_COLUMNS, Draw, Encoded, Example, Labels
from fjft.data.labelled import read_text
from fjft.data.sources import list_specs
from fjft.data.templates import MalformedError
from fjft.errors import UserError
from fjft.labels import IGNORED

NO_TOKEN = -1  # beyond a source


def find_labels(config: Config) -> None:
    """Texts are not labelled."""
    del config


class Encoder:
    """Turns pairs of texts into examples with one tokenizer and one config.

    Args:
      tokenizer: A Hugging Face tokenizer; where it writes in another way than it reads,
        as translation models' do, targets are tokenized as it writes.
      config: `text_columns`, `max_length` (of the longer text) and `truncation` are
        used.

    Raises:
      UserError: There are not two columns of text.
    """

    columns: tuple[str, ...] = TEXT_COLUMNS
    labels: Labels | None = None
    draw: Draw | None = None
    num_parts: int = 1
    generates: bool = True

    def __init__(self, tokenizer: Any, config: Config):
        self._text_columns = list_specs(config.text_columns)
        if len(self._text_columns) != 2:
            raise UserError(
                f"data.text_columns is {config.text_columns!r}; name two columns with "
                "a comma, that of the text to be read and that of the text to be "
                "written, such as 'source,target'"
            )
        self._tokenizer = tokenizer
        self._config = config

    def read(self, values: dict[str, Any]) -> tuple[str, tuple[str, str]]:
        """Reads a row's columns.

        Raises:
          MalformedError: A text is missing or empty.
        """
        source, target = (read_text(values, column) for column in self._text_columns)
        return "source/target", (source, target)

    def encode(self, samples: Sequence[tuple[str, str]]) -> list[Encoded]:
        """Encodes pairs, each to an example or to the reason why it cannot be used."""
        if not samples:
            return []
        sources, targets = map(list, zip(*samples, strict=True))
        read = self._tokenizer(sources, verbose=False)["input_ids"]
        written = self._tokenizer(text_target=targets, verbose=False)["input_ids"]
        return list(map(self._make_example, read, written))

    def _make_example(self, source: list[int], target: list[int]) -> Encoded:
        limit, end = self._config.max_length, self._tokenizer.eos_token_id
        if end is not None and end not in target:
            target = [*target, end]
        length = max(len(source), len(target))
        if length > limit:
            if self._config.truncation != "truncate":
                return MalformedError(
                    f"longer than max_length = {limit} tokens", f"{length} tokens"
                )
            # What a text ends with is kept.
            source, target = (
                ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]
                for ids in (source, target)
            )
        ends = (target[-1],) if end in target else ()
        columns = lay_side_by_side(source, target)
        return Example(columns, None, ends, length > limit)


def lay_side_by_side(source: list[int], target: list[int]) -> dict[str, np.ndarray]:
    """Both texts as columns of one example, the shorter one filled up."""
    length = max(len(source), len(target))
    return {
        "input_ids": _fill(source, length, NO_TOKEN),
        "labels": _fill(target, length, IGNORED),
    }


def _fill(ids: list[int], length: int, filler: int) -> np.ndarray:
    return np.array([*ids, *[filler] * (length - len(ids))], np.int32)


def ask(example: Example) -> tuple[list[int], list[int]]:
    """The two texts; see `encoders`."""
    source, target = (example.columns[name] for name in TEXT_COLUMNS)
    return source[source != NO_TOKEN].tolist(), target[target != IGNORED].tolist()


def show_example(tokenizer: Any, example: Example, labels: None = None) -> str:
    """Decodes both texts: `two</s> → 【T UW1</s>】`."""
    del labels
    read, written = map(tokenizer.decode, ask(example))
    return f"{read} → 【{written}】"

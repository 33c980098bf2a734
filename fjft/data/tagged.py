r"""Texts of which every word has a tag.

    {"tokens": ["Ada", "Lovelace", "wrote"], "tags": ["B-PER", "I-PER", "O"]}
    {"text": "Ada\tB-PER\nLovelace\tI-PER\nwrote\tO"}

The second is what a `.txt` file in CoNLL's layout is read as: a word to a line, its tag
in the last column, sentences between blank lines. Of a word that the tokenizer cuts the
first piece has the tag, the others are not learned:
`[CLS] ada love ##lace wrote [SEP]` with `_ B-PER I-PER _ O _`.
"""

import bisect
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from fjft.data.config import Config
from fjft.data.examples import TEXT_COLUMNS, Draw, Encoded, Example, Labels
from fjft.data.labelled import sort_names
from fjft.data.sources import list_specs, read_rows
from fjft.data.templates import MalformedError
from fjft.errors import UserError
from fjft.labels import IGNORED


@dataclasses.dataclass(frozen=True, slots=True)
class Tagged:
    """Words, and a tag for each."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


class Encoder:
    """Turns tagged rows into examples with one tokenizer and one config.

    Args:
      tokenizer: A Hugging Face tokenizer of the fast kind.
      config: `text_columns`, `label_column`, `label_names`, `max_length` and
        `truncation` are used, and `train` to find the tags.

    Raises:
      UserError: There are no two tags.
    """

    columns: tuple[str, ...] = TEXT_COLUMNS
    draw: Draw | None = None
    num_parts: int = 1
    generates: bool = False

    def __init__(self, tokenizer: Any, config: Config):
        self._tokenizer = tokenizer
        self._config = config
        self.labels: Labels | None = find_labels(config)
        self._ids = {name: i for i, name in enumerate(self.labels.names)}

    def read(self, values: dict[str, Any]) -> tuple[str, Tagged]:
        """Reads a row's columns.

        Raises:
          MalformedError: There are no words, as many tags, or a tag is unknown.
        """
        sample = _read_tagged(values, self._config)
        for tag in sample.tags:
            if tag not in self._ids:
                raise MalformedError(
                    "unknown tag", f"{tag!r}; known: {', '.join(self._ids)}"
                )
        return "tagged words", sample

    def encode(self, samples: Sequence[Tagged]) -> list[Encoded]:
        """Encodes samples, each to an example or the reason why it cannot be used."""
        if not samples:
            return []
        limit, is_cut = self._config.max_length, self._config.truncation == "truncate"
        encoded = self._tokenizer(
            [" ".join(s.words) for s in samples],
            truncation=is_cut,
            max_length=limit if is_cut else None,
            verbose=False,
        )
        return [
            self._make_example(sample, encoding)
            for sample, encoding in zip(samples, encoded.encodings, strict=True)
        ]

    def _make_example(self, sample: Tagged, encoding: Any) -> Example | MalformedError:
        if len(encoding.ids) > (limit := self._config.max_length):
            reason = f"longer than max_length = {limit} tokens"
            return MalformedError(reason, f"{len(encoding.ids)} tokens")
        # A token belongs to the word that its last character is in: some tokenizers
        # count the space before a word as its first token's.
        lengths = np.array([len(word) for word in sample.words])
        ends = np.cumsum(lengths + 1) - 1
        labels = np.full(len(encoding.ids), IGNORED, np.int32)
        last = -1
        for place, (start, end) in enumerate(encoding.offsets):
            if encoding.special_tokens_mask[place] or start == end:
                continue
            word = bisect.bisect_left(ends, end)
            if word > last:
                labels[place] = self._ids[sample.tags[word]]
                last = word
        if last < 0:
            return MalformedError("no token but special ones")
        columns = {"input_ids": np.array(encoding.ids, np.int32), "labels": labels}
        return Example(columns, is_truncated=bool(encoding.overflowing))


def find_labels(config: Config) -> Labels:
    """The tags that a config names, or else those that its training data have, sorted.

    Raises:
      UserError: There are not at least two.
    """
    names = list_specs(config.label_names)
    if not names:
        found: set[str] = set()
        for row in read_rows(config.train, sample_by=config.sample_by):
            try:
                found.update(_read_tagged(row.values, config).tags)
            except MalformedError:
                continue  # Rejected with its reason when it is read for its words.
        names = sort_names(found)
    if len(names) < 2:
        raise UserError(
            f"data.train has the tags {names} in its column {config.label_column!r}, "
            "which leaves nothing to tell apart; name another data.label_column, or "
            "the tags in data.label_names"
        )
    return Labels(None, tuple(names))


def _read_tagged(values: dict[str, Any], config: Config) -> Tagged:
    words, tags = values.get(config.text_columns), values.get(config.label_column)
    if isinstance(words, str) and tags is None:
        words, tags = _read_conll(words)
    if not isinstance(words, list) or not isinstance(tags, list):
        raise MalformedError(
            f"no words and tags in the columns {config.text_columns!r} and "
            f"{config.label_column!r}",
            f"it has {', '.join(map(str, values)) or 'none'}",
        )
    if not words:
        raise MalformedError("empty")
    if len(words) != len(tags):
        raise MalformedError("not a tag for each word", f"{len(words)}, {len(tags)}")
    names = _tag_names(tags, config)
    return Tagged(tuple(map(str, words)), names)


def _read_conll(text: str) -> tuple[list[str], list[str]]:
    """Words and tags of lines, whose columns stand between tabs or spaces."""
    lines = [line.split("\t" if "\t" in line else None) for line in text.splitlines()]
    if any(len(line) < 2 for line in lines):
        raise MalformedError("a line without a word and a tag")
    return [line[0] for line in lines], [line[-1].strip() for line in lines]


def _tag_names(tags: list[Any], config: Config) -> tuple[str, ...]:
    """Tags by name; numbers are places in `label_names`, as in datasets of the hub."""
    known = list_specs(config.label_names)
    if known and all(isinstance(tag, int) and 0 <= tag < len(known) for tag in tags):
        return tuple(known[tag] for tag in tags)
    return tuple(map(str, tags))


def show_example(tokenizer: Any, example: Example, labels: Labels) -> str:
    """Tokens with their tags: `[CLS] ada/B-PER love/I-PER ##lace wrote/O [SEP]`."""
    ids, tags = (example.columns[name].tolist() for name in TEXT_COLUMNS)
    return " ".join(
        token if tag == IGNORED else f"{token}/{labels.names[tag]}"
        for token, tag in zip(tokenizer.convert_ids_to_tokens(ids), tags, strict=True)
    )

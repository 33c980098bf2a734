"""Texts, or pairs of texts, that are labelled as wholes.

    {"text": "What a film!", "label": "positive"}
    {"premise": "It rains.", "hypothesis": "It is wet.", "label": 0}

Which columns are read is for the config to say. The tokenizer puts its own special
tokens around them: `[CLS] it rains . [SEP] it is wet . [SEP]`.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from fjft.data.config import Config
from fjft.data.examples import Draw, Encoded, Example, Labels, Layout, without_label
from fjft.data.sources import list_specs, read_rows
from fjft.data.templates import MalformedError
from fjft.errors import UserError


@dataclasses.dataclass(frozen=True, slots=True)
class Labelled:
    """One text or two, and the target of `Labels`."""

    texts: tuple[str, ...]
    target: np.ndarray


class Encoder:
    """Turns labelled rows into examples with one tokenizer and one config.

    Args:
      tokenizer: A Hugging Face tokenizer of the fast kind.
      config: `problem_type`, `text_columns`, `label_column`, `label_names`,
        `max_length` and `truncation` are used, and `train` to find the labels.

    Raises:
      UserError: There are not one or two columns of text, or no two labels.
    """

    draw: Draw | None = None
    num_parts: int = 1
    generates: bool = False

    def __init__(self, tokenizer: Any, config: Config):
        self._text_columns = list_specs(config.text_columns)
        if len(self._text_columns) not in (1, 2):
            raise UserError(
                f"data.text_columns is {config.text_columns!r}; name one column, or "
                "two with a comma"
            )
        self._tokenizer = tokenizer
        self._config = config
        self._has_types = "token_type_ids" in tokenizer.model_input_names
        self.columns: tuple[str, ...] = name_columns(self._has_types)
        self.labels: Labels | None = find_labels(config)
        self._ids = {name: i for i, name in enumerate(self.labels.names)}

    def read(self, values: dict[str, Any]) -> tuple[str, Labelled]:
        """Reads a row's columns.

        Raises:
          MalformedError: A text is missing or empty, or the label is none of them.
        """
        texts = tuple(read_text(values, column) for column in self._text_columns)
        target = self._read_target(values)
        return "labelled pair" if len(texts) == 2 else "labelled text", Labelled(
            texts, target
        )

    def _read_target(self, values: dict[str, Any]) -> np.ndarray:
        if self._config.problem_type == "regression":
            return _read_numbers(values, list_specs(self._config.label_column))
        names = _read_names(values, self._config)
        for name in names:
            if name not in self._ids:
                raise MalformedError(
                    "unknown label", f"{name!r}; known: {', '.join(self._ids)}"
                )
        ids = [self._ids[name] for name in names]
        if self._config.problem_type == "single_label_classification":
            return np.array(ids[0], np.int32)
        target = np.zeros(len(self._ids), np.int32)
        target[ids] = 1
        return target

    def encode(self, samples: Sequence[Labelled]) -> list[Encoded]:
        """Encodes samples, each to an example or to the reason why it cannot be used.

        What is too long is cut by the tokenizer, which leaves the special tokens, and
        of a pair cuts the longer text.
        """
        if not samples:
            return []
        limit, is_cut = self._config.max_length, self._config.truncation == "truncate"
        encoded = self._tokenizer(
            *(list(texts) for texts in zip(*(s.texts for s in samples), strict=True)),
            truncation="longest_first" if is_cut else False,
            max_length=limit if is_cut else None,
            return_token_type_ids=self._has_types,
            return_attention_mask=False,
            verbose=False,
        )
        results: list[Encoded] = []
        for i, sample in enumerate(samples):
            columns = {c: np.array(encoded[c][i], np.int32) for c in self.columns}
            was_cut = bool(encoded.encodings[i].overflowing)
            example = Example(columns, sample.target, is_truncated=was_cut)
            if len(example) > limit:
                reason = f"longer than max_length = {limit} tokens"
                results.append(MalformedError(reason, f"{len(example)} tokens"))
            else:
                results.append(example)
        return results


def name_columns(has_types: bool) -> tuple[str, ...]:
    """What there is of each token."""
    return ("input_ids", "token_type_ids") if has_types else ("input_ids",)


def make_layout(config: Config, has_types: bool, num_labels: int) -> Layout:
    """What batches hold.

    Args:
      config: `problem_type` is used.
      has_types: Whether the tokenizer tells texts apart.
      num_labels: Outputs of the head.
    """
    is_single = config.problem_type == "single_label_classification"
    dtype = np.float32 if config.problem_type == "regression" else np.int32
    shape = () if is_single else (num_labels,)
    return Layout(name_columns(has_types), without_label(shape, dtype))


def find_labels(config: Config) -> Labels:
    """The labels that a config names, or else those that its training data have.

    Names that are all whole numbers are sorted as such, others by their letters.

    Raises:
      UserError: There are not at least two.
    """
    if config.problem_type == "regression":
        return Labels(config.problem_type, tuple(list_specs(config.label_column)))
    names = list_specs(config.label_names)
    if not names:
        found: set[str] = set()
        for row in read_rows(config.train, sample_by=config.sample_by):
            try:
                found.update(_read_names(row.values, config))
            except MalformedError:
                continue  # Rejected with its reason when it is read for its text.
        names = sort_names(found)
    fewest = 2 if config.problem_type == "single_label_classification" else 1
    if len(names) < fewest:
        raise UserError(
            f"data.train has the labels {names} in its column "
            f"{config.label_column!r}, which leaves nothing to tell apart; name "
            "another data.label_column, or the labels in data.label_names"
        )
    return Labels(config.problem_type, tuple(names))


def sort_names(names: Collection[str]) -> list[str]:
    """In order of number if all names are whole numbers, otherwise of letters."""
    is_numeric = all(name.lstrip("-").isdecimal() for name in names)
    return sorted(names, key=int if is_numeric else str)


def read_text(values: dict[str, Any], column: str) -> str:
    """The text in a row's column.

    Raises:
      MalformedError: There is none.
    """
    value = values.get(column)
    if not isinstance(value, str):
        known = ", ".join(map(str, values)) or "none"
        raise MalformedError(f"no text in the column {column!r}", f"it has {known}")
    if not value.strip():
        raise MalformedError("empty", f"{column} is empty")
    return value


def _read_names(values: dict[str, Any], config: Config) -> list[str]:
    value = values.get(config.label_column)
    reason = f"no label in the column {config.label_column!r}"
    if config.problem_type == "multi_label_classification":
        if isinstance(value, str):
            return list_specs(value)
        if isinstance(value, list):
            return [_name(v, reason) for v in value]
        raise MalformedError(reason)
    return [_name(value, reason)]


def _name(value: Any, reason: str) -> str:
    if isinstance(value, bool | int) or (isinstance(value, str) and value.strip()):
        return str(value).strip()
    raise MalformedError(reason, f"{value!r} is no name")


def _read_numbers(values: dict[str, Any], columns: Sequence[str]) -> np.ndarray:
    try:
        numbers = np.array([float(values[column]) for column in columns], np.float32)
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedError(
            f"no number in the column {', '.join(columns)}", str(error)
        ) from error
    if not np.isfinite(numbers).all():
        raise MalformedError("not a finite number")
    return numbers


def show_example(tokenizer: Any, example: Example, labels: Labels) -> str:
    """Decodes an example and says its label: `[CLS] what a film! [SEP] → positive`."""
    names = ", ".join(labels.of(example))
    text = tokenizer.decode(example.columns["input_ids"].tolist())
    return f"{text} → {names or 'no label'}"

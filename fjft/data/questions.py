"""Questions, and texts in which their answers stand, as in SQuAD.

    {"question": "Who wrote it?", "context": "Ada wrote it in 1843.",
     "answers": {"text": ["Ada"], "answer_start": [0]}}

becomes `[CLS] who wrote it ? [SEP] ada wrote it in 1843 . [SEP]`. A long context is
read through several windows, each an example: it learns the places of the first
answer's first and last token, or 0 and 0 where the window does not hold it all.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from fjft.data.config import Config
from fjft.data.examples import Draw, Encoded, Example, Labels, Layout, without_label
from fjft.data.labelled import name_columns, read_text
from fjft.data.sources import list_specs
from fjft.data.templates import MalformedError
from fjft.data.tokenize import find_labels
from fjft.errors import UserError

__all__ = ["Encoder", "find_labels", "make_layout", "show_example"]


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """A question, its context, and where the first of its answers starts there."""

    text: str
    context: str
    answers: tuple[str, ...]
    start: int


class Encoder:
    """Turns questions into windows with one tokenizer and one config.

    A window's note is JSON: `question`, its number; `windows`, how many there are of
    it; `answers`; `first`, the window's first token of the context; `context`, the part
    that it sees; and `offsets`, the characters of each token there.

    Args:
      tokenizer: A Hugging Face tokenizer of the fast kind.
      config: `text_columns`, `label_column`, `max_length` and `doc_stride` are used.

    Raises:
      UserError: `text_columns` are not two.
    """

    labels: Labels | None = None
    draw: Draw | None = None
    num_parts: int = 1
    generates: bool = False

    def __init__(self, tokenizer: Any, config: Config):
        self._columns = list_specs(config.text_columns)
        if len(self._columns) != 2:
            raise UserError(
                f"data.text_columns is {config.text_columns!r}; name the columns of "
                "the question and of its context, with a comma"
            )
        self._tokenizer = tokenizer
        self._config = config
        self._has_types = "token_type_ids" in tokenizer.model_input_names
        self.columns: tuple[str, ...] = name_columns(self._has_types)
        self._num_questions = 0

    def read(self, values: dict[str, Any]) -> tuple[str, Question]:
        """Reads a row's columns.

        Raises:
          MalformedError: A text is missing, or an answer is not where it should be.
        """
        question, context = (read_text(values, column) for column in self._columns)
        answers = values.get(self._config.label_column)
        try:
            texts = tuple(map(str, answers["text"]))  # pyright: ignore
            start = int(answers["answer_start"][0])  # pyright: ignore
        except (IndexError, KeyError, TypeError, ValueError) as error:
            reason = f"no answer in the column {self._config.label_column!r}"
            raise MalformedError(reason, repr(answers)) from error
        if not texts[0] or not context.startswith(texts[0], start):
            raise MalformedError("the answer is not where it should be", texts[0])
        return "question", Question(question.lstrip(), context, texts, start)

    def encode(self, samples: Sequence[Question]) -> list[Encoded]:
        """Encodes questions, each to its windows of at most `max_length` tokens."""
        room = self._config.max_length - self._tokenizer.num_special_tokens_to_add(True)
        if room <= self._config.doc_stride:
            raise UserError(
                f"data.doc_stride = {self._config.doc_stride} leaves windows of "
                f"data.max_length = {self._config.max_length} tokens nothing new; use "
                "a smaller one"
            )
        return [self._make_windows(sample, room) for sample in samples]

    def _make_windows(self, sample: Question, room: int) -> Encoded:
        asked = self._tokenizer(sample.text, add_special_tokens=False)
        if room - len(asked["input_ids"]) <= self._config.doc_stride:
            return MalformedError(
                "the question leaves too little of max_length to its context",
                f"{len(asked['input_ids'])} tokens",
            )
        windows = self._tokenizer(
            sample.text,
            sample.context,
            truncation="only_second",
            max_length=self._config.max_length,
            stride=self._config.doc_stride,
            return_overflowing_tokens=True,
            return_token_type_ids=self._has_types,
        ).encodings
        number = self._num_questions
        self._num_questions += 1
        examples = []
        for window in windows:
            places = [i for i, part in enumerate(window.sequence_ids) if part == 1]
            if not places:
                return MalformedError("no token but the question's")
            offsets = np.array([window.offsets[i] for i in places])
            seen = slice(int(offsets[0, 0]), int(offsets[-1, 1]))
            note = {
                "question": number,
                "windows": len(windows),
                "answers": sample.answers,
                "first": places[0],
                "context": sample.context[seen],
                "offsets": (offsets - offsets[0, 0]).tolist(),
            }
            columns = {"input_ids": np.array(window.ids, np.int32)}
            if self._has_types:
                columns["token_type_ids"] = np.array(window.type_ids, np.int32)
            target = _find_answer(sample, offsets, places[0])
            examples.append(Example(columns, target, note=json.dumps(note)))
        return examples


def make_layout(config: Config, has_types: bool, num_labels: int) -> Layout:
    """What batches hold; arguments as in `labelled`."""
    del config, num_labels
    return Layout(
        name_columns(has_types), without_label((2,), np.int32), is_numbered=True
    )


def _find_answer(sample: Question, offsets: np.ndarray, first: int) -> np.ndarray:
    """The answer's first and last token in a window, or 0 and 0."""
    start, end = sample.start, sample.start + len(sample.answers[0])
    if start < offsets[0, 0] or end > offsets[-1, 1]:
        return np.zeros(2, np.int32)
    # Some offsets have a space before them, and some tokens share their characters.
    begins = np.searchsorted(offsets[:, 0], start, "right") - 1
    ends = np.searchsorted(offsets[:, 1], end, "left")
    return np.array([first + begins, first + ends], np.int32)


def show_example(tokenizer: Any, example: Example, labels: None = None) -> str:
    """Decodes a window, and the answer: `[CLS] who ? [SEP] ada did [SEP] → ada`."""
    del labels
    assert example.target is not None
    ids = example.columns["input_ids"].tolist()
    start, end = example.target.tolist()
    return f"{tokenizer.decode(ids)} → {tokenizer.decode(ids[start : end + 1])}"

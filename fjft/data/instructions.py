"""Rows to instructions: templates in words, which columns fill.

    Translate from {source} to {target}: {text} ||| {translation}

makes of `{"source": "French", "target": "English", "text": "oui", ...}` the row

    {"instruction": "Translate from French to English: oui", "output": "yes"}

which is read as any such row is. Of several templates that a row may have, one is drawn
by the seed and the row's number, and stays the same in every epoch.
"""

import dataclasses
import string
from collections.abc import Mapping
from typing import Any

import numpy as np

from fjft.data.config import Config
from fjft.data.draws import draw
from fjft.data.templates import MalformedError
from fjft.errors import UserError

SEPARATOR = "|||"  # between question and answer, as in PromptSource (2202.01279)

# Keeps these draws apart from others of the same rows and seed.
_STREAM = 1


@dataclasses.dataclass(frozen=True)
class Template:
    """What is asked and answered, in words.

    Attributes:
      name: Of the template.
      question: Pieces of text, each with the column that follows it, or None.
      answer: The same of the answer.
    """

    name: str
    question: tuple[tuple[str, str | None], ...]
    answer: tuple[tuple[str, str | None], ...]

    def fill(self, values: Mapping[str, Any]) -> dict[str, str]:
        """A row's instruction.

        Raises:
          MalformedError: The row lacks a column, or it holds no text or number.
        """
        parts = {"instruction": self.question, "output": self.answer}
        return {
            name: "".join(
                text + ("" if column is None else _say(values, column, self.name))
                for text, column in pieces
            )
            for name, pieces in parts.items()
        }


class Instructions:
    """All templates of a config.

    Args:
      config: `instructions`, `train` and `eval` are used.
      seed: Of the draws.

    Raises:
      UserError: A template is broken, or is for a source that there is not.
    """

    def __init__(self, config: Config, seed: int):
        self._seed = seed
        self._is_named = isinstance(config.train, Mapping)
        self._templates: dict[str, list[Template]] = {}
        for name, text in config.instructions.items():
            source = name.partition("/")[0] if self._is_named else ""
            self._templates.setdefault(source, []).append(_parse(name, text))
        if not self._is_named or not self._templates:
            return
        known = {*config.train_sources, *config.eval_sources}
        if unknown := self._templates.keys() - known:
            raise UserError(
                f"data.instructions.{min(unknown)} is for no source; begin its name "
                f"with one of data.train, {', '.join(config.train_sources)}"
            )
        if "" in known:
            raise UserError(
                "data.eval has no name to find its data.instructions by; make it a "
                "mapping of names to sources, as data.train is"
            )

    def choose(self, source: str, number: int) -> Template | None:
        """The template of a row; None where there are none for its source.

        Args:
          source: The name of its source, "" if it has none.
          number: The row's, over all sources.
        """
        templates = self._templates.get(source if self._is_named else "")
        if not templates:
            return None
        (drawn,) = draw(np.array([number]), self._seed, _STREAM)
        return templates[int(drawn * len(templates))]


def _parse(name: str, text: str) -> Template:
    option = f"data.instructions.{name}"
    question, separator, answer = text.partition(SEPARATOR)
    if not separator or not question.strip() or not answer.strip():
        raise UserError(
            f"{option} is {text!r}; write the question, {SEPARATOR} and the answer, "
            "such as 'Translate into English: {text} ||| {translation}'"
        )
    pieces = [_parse_half(option, half.strip()) for half in (question, answer)]
    return Template(name, *pieces)


def _parse_half(option: str, text: str) -> tuple[tuple[str, str | None], ...]:
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise UserError(
            f"{option}: {error} in {text!r}; write {{{{ and }}}} for braces"
        ) from error
    for _, column, spec, conversion in parsed:
        if column is not None and (not column or spec or conversion):
            raise UserError(
                f"{option}: braces hold the name of a column and nothing else, unlike "
                f"those in {text!r}; write {{{{ and }}}} for braces"
            )
    return tuple((literal, column) for literal, column, _, _ in parsed)


def _say(values: Mapping[str, Any], column: str, template: str) -> str:
    """A column's value as text; `translation.en` is one inside another."""
    value: Any = values
    for name in [column] if column in values else column.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    if not isinstance(value, str | int | float):
        raise MalformedError(
            "no text or number for an instruction",
            f"{template} needs {column!r}, which is {type(value).__name__}",
        )
    return str(value)

"""Samples to token ids and labels.

A chat is rendered to text once and tokenized once, so its ids are exactly those of
`tokenizer.apply_chat_template`. Which of them are learned follows from the characters
each token stands for: a token is learned if any of its characters lies in a learned
span. Labels equal the ids there and are -100 elsewhere; the first is always -100:
nothing comes before it to predict it from.
"""

import bisect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fjft.data.config import Config
from fjft.data.examples import TEXT_COLUMNS, Draw, Encoded, Example, Labels
from fjft.data.templates import (
    Chat,
    MalformedError,
    Pair,
    Sample,
    Text,
    add_system,
    read_sample,
)
from fjft.data.turns import Span, TurnFinder
from fjft.errors import UserError
from fjft.labels import IGNORED


def find_labels(config: Config) -> None:
    """Text is not labelled as a whole."""
    del config


class Encoder:
    """Turns samples into examples with one tokenizer and one config.

    Args:
      tokenizer: A Hugging Face tokenizer of the fast kind. If `config.chat_template`
        is set, its `chat_template` is replaced, so that it is saved and generates
        with the same.
      config: `max_length`, `train_on`, `truncation`, `chat_template` and `system` are
        used.

    Raises:
      UserError: The tokenizer cannot say which characters its tokens stand for, the
        template cannot be read, or there is none that a system prompt would need.
    """

    columns: tuple[str, ...] = TEXT_COLUMNS
    labels: Labels | None = None
    draw: Draw | None = None
    num_parts: int = 1
    # What is learned is to be generated, so it should be learned where to stop.
    generates: bool = True

    def __init__(self, tokenizer: Any, config: Config):
        if config.chat_template:
            tokenizer.chat_template = _read_template(config.chat_template)
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"{type(tokenizer).__name__} gives no character offsets; use a model "
                "with a fast tokenizer (a tokenizer.json)"
            )
        self._tokenizer = tokenizer
        self._config = config
        self.has_template = bool(tokenizer.chat_template)
        if config.system and not self.has_template:
            raise UserError(
                "data.system is for chats, but the tokenizer has no chat template; set "
                "data.chat_template to a Jinja file, or data.system=''"
            )
        self._turns = TurnFinder(tokenizer) if self.has_template else None
        self._before, self._after = _find_special_ids(tokenizer)
        self._special_ids = frozenset(tokenizer.added_tokens_decoder)

    def read(self, values: dict[str, Any]) -> tuple[str, Sample]:
        """Reads a row's columns; see `templates.read_sample`."""
        return read_sample(values, self.has_template)

    def encode(self, samples: Sequence[Sample]) -> list[Encoded]:
        """Encodes samples, each to an example or to the reason why it cannot be used.

        Raises:
          UserError: A sample is a chat and the tokenizer has no chat template.
        """
        if self._config.system:
            samples = [add_system(sample, self._config.system) for sample in samples]
        texts = self._render(samples)
        good = [t for t in texts if isinstance(t, str)]
        # Special tokens are in the templates already; plain text gets them below.
        encoded = self._tokenizer(
            good or [""],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        results: list[Encoded] = []
        for sample, text in zip(samples, texts, strict=True):
            if isinstance(text, MalformedError):
                results.append(text)
                continue
            ids, offsets = next(pairs)
            try:
                results.append(self._make_example(sample, text, ids, offsets))
            except MalformedError as error:
                results.append(error)
        return results

    def _render(self, samples: Sequence[Sample]) -> list[str | MalformedError]:
        chats = [s for s in samples if isinstance(s, Chat)]
        if chats and self._turns is None:
            raise UserError(
                "the data are chats, but the tokenizer has no chat template; use an "
                "instruct model's tokenizer or set data.chat_template to a Jinja file"
            )
        rendered = iter(self._turns.render(chats) if self._turns else ())
        return [
            next(rendered)
            if isinstance(sample, Chat)
            else sample.prompt + sample.completion
            if isinstance(sample, Pair)
            else sample.text
            for sample in samples
        ]

    def _make_example(
        self, sample: Sample, text: str, ids: list[int], offsets: list[Span]
    ) -> Example | list[Example]:
        turns = self._find_turns(sample, text)
        turns = [_find_tokens(offsets, start, end) for start, end in turns]
        if not isinstance(sample, Chat):
            shift = len(self._before)
            ids = [*self._before, *ids, *self._after]
            # The end that follows the last character belongs to the turn.
            turns = [(start + shift, len(ids)) for start, _ in turns]
        input_ids = np.array(ids, np.int32)
        is_truncated = len(ids) > self._config.max_length
        is_split = self._config.truncation == "split" and isinstance(sample, Text)
        if is_truncated and is_split:
            return self._split(input_ids)
        runs = [(0, len(ids))] if self._config.train_on == "all" else turns
        if is_truncated:
            if self._config.truncation != "truncate":
                raise MalformedError(
                    f"longer than max_length = {self._config.max_length} tokens",
                    f"{len(ids)} tokens",
                )
            input_ids = input_ids[: self._config.max_length]
        labels = np.full_like(input_ids, IGNORED)
        for start, end in runs:
            labels[start:end] = input_ids[start:end]
        labels[:1] = IGNORED
        if (labels == IGNORED).all():
            raise MalformedError("nothing to learn", _explain_nothing(runs))
        limit = len(input_ids)
        ends = [ids[end - 1] for start, end in turns if start < end <= limit]
        end_tokens = tuple(i for i in ends if i in self._special_ids)
        columns = {"input_ids": input_ids, "labels": labels}
        return Example(columns, None, end_tokens, is_truncated)

    def _split(self, ids: np.ndarray) -> list[Example]:
        """A text's pieces; before the first token of each there is nothing to see."""
        examples = []
        for start in range(0, len(ids) - 1, self._config.max_length):
            piece = ids[start : start + self._config.max_length]
            labels = piece.copy()
            labels[0] = IGNORED
            is_end = start + len(piece) == len(ids) and ids[-1] in self._special_ids
            end_tokens = (int(ids[-1]),) if is_end else ()
            columns = {"input_ids": piece, "labels": labels}
            examples.append(Example(columns, None, end_tokens))
        return examples

    def _find_turns(self, sample: Sample, text: str) -> list[Span]:
        """The characters of the assistant's turns, the completion or the document."""
        if isinstance(sample, Pair):
            return [(len(sample.prompt), len(text))]
        if not isinstance(sample, Chat):
            return [(0, len(text))]
        assert self._turns is not None  # _render has checked
        try:
            turns = self._turns.find(sample, text)
        except MalformedError:
            if self._config.train_on == "all":
                return []  # everything is learned wherever the turns lie
            raise
        return turns[-1:] if self._config.train_on == "last" else turns


def _explain_nothing(runs: list[Span]) -> str:
    if not runs:
        return "no assistant turn"
    return "what is learned lies behind max_length"


def _find_tokens(offsets: list[Span], start: int, end: int) -> Span:
    """The tokens [first, last) that stand for any of the characters [start, end).

    Tokenizers may leave a space out of its token's offsets, or give several tokens
    (the bytes of one character) the same ones, so single characters cannot be looked
    up; but starts and ends never decrease, which is enough for bisection.
    """
    first = bisect.bisect_right(offsets, start, key=lambda span: span[1])
    last = max(
        bisect.bisect_left(offsets, end, key=lambda span: span[0]),
        bisect.bisect_right(offsets, end, key=lambda span: span[1]),
    )
    return first, max(first, last)


def _find_special_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What a document begins with (bos, often) and ends with (eos, always if any)."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    before, after = [], []
    for i in range(len(whole) - len(plain) + 1):
        if whole[i : i + len(plain)] == plain:
            before, after = whole[:i], whole[i + len(plain) :]
            break
    eos = tokenizer.eos_token_id
    if eos is not None and after[-1:] != [eos]:
        after = [*after, eos]
    return before, after


def _read_template(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"data.chat_template: cannot read {path!r}: {error.strerror}; name a file "
            "that holds a Jinja template"
        ) from error


def ask(example: Example) -> tuple[list[int], list[int]]:
    """What stands before the last learned run, and the run; see `encoders`.

    What is learned from its second token on is a document, which asks nothing.
    """
    input_ids = example.columns["input_ids"]
    edges = np.flatnonzero(np.diff(example.columns["labels"] != IGNORED)) + 1
    # Runs begin with one that is not learned, so of two edges the first is a start.
    start, end = [*edges.tolist(), len(input_ids)][(len(edges) - 1) // 2 * 2 :][:2]
    question = input_ids[:start] if start > 1 else input_ids[:0]
    return question.tolist(), input_ids[start:end].tolist()


def show_example(tokenizer: Any, example: Example, labels: None = None) -> str:
    """Decodes an example, what is learned in brackets: `2 + 2 = 【4<|im_end|>】`."""
    del labels
    input_ids = example.columns["input_ids"]
    is_learned = example.columns["labels"] != IGNORED
    edges = np.flatnonzero(np.diff(is_learned)) + 1
    pieces = []
    for run, learned in zip(
        np.split(input_ids, edges), np.split(is_learned, edges), strict=True
    ):
        text = tokenizer.decode(run.tolist(), clean_up_tokenization_spaces=False)
        pieces.append(f"【{text}】" if learned[0] else text)
    return "".join(pieces)

"""Texts of which spans are taken out, to be written by a model that reads the rest.

    {"text": "Thank you for inviting me to your party last week."}

becomes, in each epoch anew, by the seed, something like

    input_ids    Thank you <extra_id_0> me to your party <extra_id_1> week . </s>
    labels       <extra_id_0> for inviting <extra_id_1> last </s>

(Raffel et al. 2020, section 3.1.4), side by side as in `seq2seq`. A text too long for
that becomes several examples.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from fjft.data.config import Config
from fjft.data.examples import TEXT_COLUMNS, Draw, Encoded, Example, Labels
from fjft.data.labelled import read_text
from fjft.data.seq2seq import lay_side_by_side, show_example
from fjft.data.templates import MalformedError
from fjft.data.tokenize import find_labels
from fjft.errors import UserError

__all__ = ["Corruption", "Encoder", "find_labels", "show_example"]

_SENTINEL = re.compile(r"<extra_id_(\d+)>")


class Encoder:
    """Turns texts into examples with one tokenizer and one config.

    Args:
      tokenizer: A Hugging Face tokenizer with an end of text, and `<extra_id_0>` and so
        on to stand for spans, as T5's.
      config: `text_columns`, `max_length` (of the longer of both texts),
        `noise_density` and `mean_noise_span_length` are used.

    Raises:
      UserError: The tokenizer has no such tokens, or fewer than there may be spans.
    """

    columns: tuple[str, ...] = ("input_ids",)
    labels: Labels | None = None
    num_parts: int = 1
    generates: bool = False

    def __init__(self, tokenizer: Any, config: Config):
        found = {
            int(match[1]): id
            for token, id in tokenizer.get_vocab().items()
            if (match := _SENTINEL.fullmatch(token))
        }
        if not found or tokenizer.eos_token_id is None:
            raise UserError(
                f"{type(tokenizer).__name__} has no <extra_id_0> to stand for what is "
                "taken out, or no end of text; use T5's tokenizer, or one with T5's "
                "special tokens"
            )
        sentinels = [found[number] for number in sorted(found)]
        corruption = Corruption(
            np.array(sentinels, np.int32),
            tokenizer.eos_token_id,
            density=config.noise_density,
            mean_span=config.mean_noise_span_length,
        )
        self._limit = corruption.longest_text(config.max_length)
        num_spans = int(corruption.count(np.array(self._limit))[1])
        if num_spans > len(sentinels):
            raise UserError(
                f"data.max_length = {config.max_length} takes {num_spans} spans out "
                f"of a text, but the tokenizer has only {len(sentinels)} tokens "
                "<extra_id_0> and so on; lower it, or raise "
                "data.mean_noise_span_length"
            )
        self._tokenizer = tokenizer
        self._column = config.text_columns
        self.draw: Draw | None = corruption

    def read(self, values: dict[str, Any]) -> tuple[str, str]:
        """Reads a row's text.

        Raises:
          MalformedError: It is missing or empty.
        """
        return "text", read_text(values, self._column)

    def encode(self, samples: Sequence[str]) -> list[Encoded]:
        """Encodes texts, each to its pieces."""
        if not samples:
            return []
        encoded = self._tokenizer(
            list(samples),
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
        )
        return [self._cut(np.array(ids, np.int32)) for ids in encoded["input_ids"]]

    def _cut(self, ids: np.ndarray) -> Encoded:
        starts = range(0, len(ids), self._limit)
        pieces = [ids[start : start + self._limit] for start in starts]
        # One token is no text that could be read without a part of it.
        examples = [Example({"input_ids": p}) for p in pieces if len(p) > 1]
        return examples or MalformedError("fewer than two tokens")


class Corruption:
    """Chooses what is taken out of an example.

    Args:
      sentinels: int32, what stands for the first span, the second one and so on.
      end: The end of both texts.
      density: Share of the tokens that are taken out.
      mean_span: Tokens in a span, on average.
    """

    columns: tuple[str, ...] = TEXT_COLUMNS

    def __init__(
        self, sentinels: np.ndarray, end: int, *, density: float, mean_span: float
    ):
        self._sentinels = sentinels
        self._end = np.array([end], np.int32)
        self._density = density
        self._mean_span = mean_span

    def count(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens that are taken out of texts of at least two, and in how many spans."""
        lengths = np.asarray(lengths, np.int64)
        noise = np.clip(np.rint(lengths * self._density), 1, lengths - 1)
        spans = np.clip(np.rint(noise / self._mean_span), 1, lengths - noise)
        return noise.astype(np.int64), spans.astype(np.int64)

    def measure(self, lengths: np.ndarray) -> np.ndarray:
        """The longer of both texts, of texts that have so many tokens."""
        noise, spans = self.count(lengths)
        return np.maximum(lengths - noise, noise) + spans + 1

    def longest_text(self, max_length: int) -> int:
        """Tokens of the longest text of which neither part is longer than this.

        Raises:
          UserError: There is none.
        """
        lengths = np.arange(2, 2 * max_length + 1)
        fitting = lengths[self.measure(lengths) <= max_length]
        if not fitting.size:
            raise UserError(
                f"data.max_length = {max_length} leaves no room for a text with a gap; "
                "use at least 3"
            )
        return int(fitting[-1])

    def __call__(self, example: Example, random: np.random.Generator) -> Example:
        """Both texts.

        All ways to choose spans that do not touch are equally likely. (T5's own always
        end with the text, which of a short one would always take the end.)
        """
        ids = example.columns["input_ids"]
        noise, spans = map(int, self.count(np.array(len(ids))))
        # Before the first span and behind the last one there may be nothing.
        kept = _cut_at_random(len(ids) - noise + 2, spans + 1, random)
        kept[[0, -1]] -= 1
        taken = _cut_at_random(noise, spans, random)
        lengths = np.stack([kept, np.append(taken, 0)], axis=1).reshape(-1)
        pieces = np.split(ids, np.cumsum(lengths)[:-1])
        source, target = pieces[:1], []
        for place in range(spans):
            sign = self._sentinels[place : place + 1]
            source += [sign, pieces[2 * place + 2]]
            target += [sign, pieces[2 * place + 1]]
        source, target = (np.concatenate([*t, self._end]) for t in (source, target))
        return Example(lay_side_by_side(source.tolist(), target.tolist()))


def _cut_at_random(total: int, parts: int, random: np.random.Generator) -> np.ndarray:
    """How long each of so many parts of a whole is, at least 1: [parts]."""
    cuts = np.sort(random.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)

"""Texts of which some tokens are hidden, to be predicted from the others.

    {"text": "The quick brown fox."}

becomes `[CLS] the quick brown fox . [SEP]`, and in each epoch anew, by the seed,
something like `[CLS] the [MASK] brown dog . [SEP]`, of which `quick` and `fox` are
learned. A text that is longer than `max_length` becomes several examples.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fjft.data.config import Config
from fjft.data.examples import TEXT_COLUMNS, Draw, Encoded, Example, Labels
from fjft.data.labelled import read_text
from fjft.data.templates import MalformedError
from fjft.data.tokenize import find_labels, show_example
from fjft.errors import UserError
from fjft.labels import IGNORED

__all__ = ["Encoder", "Masking", "find_labels", "show_example"]

# Of the tokens that are learned (Devlin et al. 2018, section 3.1): so many are hidden
# behind the mask, so many become another token, and the rest stay.
_MASKED, _RANDOM = 0.8, 0.1


class Encoder:
    """Turns texts into examples with one tokenizer and one config.

    Args:
      tokenizer: A Hugging Face tokenizer of the fast kind, with a mask token.
      config: `text_columns`, `max_length`, `mlm_probability` and `whole_word_mask` are
        used.

    Raises:
      UserError: The tokenizer has no mask token, or `max_length` has no room for text.
    """

    columns: tuple[str, ...] = ("input_ids", "words")
    labels: Labels | None = None
    num_parts: int = 1
    generates: bool = False

    def __init__(self, tokenizer: Any, config: Config):
        if tokenizer.mask_token_id is None:
            raise UserError(
                f"{type(tokenizer).__name__} has no mask token; use the tokenizer of a "
                "masked language model"
            )
        if config.max_length <= tokenizer.num_special_tokens_to_add():
            raise UserError(
                f"data.max_length = {config.max_length} leaves no room between the "
                "tokenizer's special tokens; use more"
            )
        self._tokenizer = tokenizer
        self._config = config
        self.draw: Draw | None = Masking(
            mask_id=tokenizer.mask_token_id,
            vocab_size=len(tokenizer),
            probability=config.mlm_probability,
            whole_words=config.whole_word_mask,
        )

    def read(self, values: dict[str, Any]) -> tuple[str, str]:
        """Reads a row's text.

        Raises:
          MalformedError: It is missing or empty.
        """
        return "text", read_text(values, self._config.text_columns)

    def encode(self, samples: Sequence[str]) -> list[Encoded]:
        """Encodes texts, each to its pieces of at most `max_length` tokens."""
        if not samples:
            return []
        encoded = self._tokenizer(
            list(samples),
            truncation=True,
            max_length=self._config.max_length,
            return_overflowing_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        pieces: list[list[Example]] = [[] for _ in samples]
        for piece, text in zip(
            encoded.encodings, encoded["overflow_to_sample_mapping"], strict=True
        ):
            words = [-1 if word is None else word for word in piece.word_ids]
            columns = {
                "input_ids": np.array(piece.ids, np.int32),
                "words": np.array(words, np.int32),
            }
            if max(words, default=-1) >= 0:
                pieces[text].append(Example(columns))
        return [
            found or MalformedError("no token but special ones") for found in pieces
        ]


class Masking:
    """Chooses what is learned of an example, and hides it.

    Each token, or each word, is chosen by itself; if none is, then one is all the same.

    Args:
      mask_id: The mask token.
      vocab_size: Ids below it may stand in the place of others.
      probability: Of a token, or a word, to be chosen.
      whole_words: Whether words are.
    """

    columns: tuple[str, ...] = TEXT_COLUMNS

    def __init__(
        self, *, mask_id: int, vocab_size: int, probability: float, whole_words: bool
    ):
        self._mask_id = mask_id
        self._vocab_size = vocab_size
        self._probability = probability
        self._whole_words = whole_words

    def measure(self, lengths: np.ndarray) -> np.ndarray:
        """As many as before."""
        return lengths

    def __call__(self, example: Example, random: np.random.Generator) -> Example:
        """The example with hidden tokens, and `labels` that are -100 elsewhere.

        Args:
          example: `words` are -1 where a token is not to be chosen.
          random: Where the choice comes from.
        """
        ids, words = example.columns["input_ids"], example.columns["words"]
        candidates = np.flatnonzero(words >= 0)
        units = words[candidates] if self._whole_words else candidates
        unit_of, units = np.unique(units, return_inverse=True)
        is_chosen = random.random(len(unit_of)) < self._probability
        is_chosen[random.integers(len(unit_of))] |= not is_chosen.any()
        chosen = candidates[is_chosen[units]]

        labels = np.full_like(ids, IGNORED)
        labels[chosen] = ids[chosen]
        fate = random.random(len(chosen))
        others = random.integers(0, self._vocab_size, len(chosen), np.int32)
        hidden = np.where(fate < _MASKED + _RANDOM, others, ids[chosen])
        hidden = np.where(fate < _MASKED, self._mask_id, hidden)
        ids = ids.copy()
        ids[chosen] = hidden
        return Example({"input_ids": ids, "labels": labels})

"""Turns tokens that arrive one after another into text that is never taken back."""

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what half a character decodes to


class Detokenizer:
    """The text of one growing row of tokens.

    A token can be a part of a character's bytes, so that text may still change at its
    end; what is handed out is only what further tokens leave as it is.
    """

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self._stop_ids = frozenset(stop_ids)
        self._shown = ""

    def text(self, tokens: Sequence[int]) -> str:
        """The text of a whole row, without its stop token and special tokens."""
        if tokens and tokens[-1] in self._stop_ids:
            tokens = tokens[:-1]
        # Cleaning up spaces would change text that has been handed out.
        return self._tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def push(self, tokens: Sequence[int]) -> str:
        """The text that is new, and settled, now that the row is `tokens`."""
        return self._show(self.text(tokens).rstrip(UNFINISHED))

    def finish(self, tokens: Sequence[int]) -> str:
        """The rest of the text, now that the row is complete."""
        return self._show(self.text(tokens))

    def _show(self, text: str) -> str:
        # While a character's bytes arrive, a SentencePiece tokenizer can show those
        # before them as unfinished again: wait until it no longer does.
        if not text.startswith(self._shown):
            return ""
        piece = text[len(self._shown) :]
        self._shown = text
        return piece

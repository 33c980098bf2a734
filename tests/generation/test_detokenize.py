"""Streaming text: whole characters, and nothing taken back."""

import pytest
from byte_tokenizers import byte_fallback, byte_level

from fjft.generation.detokenize import Detokenizer

TEXT = "héllo, 你好 🙂🙃! naïve  spaces \n\nend"


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_pieces_are_whole_characters_and_join_to_the_text(make, step):
    tokenizer = make()
    tokens = [*tokenizer(TEXT)["input_ids"], tokenizer.eos_token_id]
    detokenizer = Detokenizer(tokenizer, [tokenizer.eos_token_id])
    ends = [*range(1, len(tokens), step), len(tokens)]
    pieces = [detokenizer.push(tokens[:end]) for end in ends]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join([*pieces, detokenizer.finish(tokens)]) == TEXT
    assert len([piece for piece in pieces if piece]) > len(ends) / 3


def test_a_text_cut_within_a_character_shows_so_at_its_end():
    tokenizer = byte_level()
    tokens = tokenizer("ab🙂")["input_ids"][:-1]
    detokenizer = Detokenizer(tokenizer, [])
    assert detokenizer.push(tokens) == "ab"
    assert detokenizer.finish(tokens) == "\ufffd"
    assert detokenizer.text(tokens) == "ab\ufffd"


def test_a_stop_token_that_is_not_special_is_left_out():
    tokenizer = byte_level()
    tokens = tokenizer("yes.")["input_ids"]
    assert Detokenizer(tokenizer, tokens[-1:]).text(tokens) == "yes"
    assert Detokenizer(tokenizer, []).text(tokens) == "yes."

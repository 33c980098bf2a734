"""Texts that belong together: a segment for each, whatever shares a row."""

import json
from typing import Any

import numpy as np
import pytest

from fjft.data import groups
from fjft.data.config import Config
from fjft.data.dataset import load_examples
from fjft.errors import UserError

ROWS = [
    {"a": "How are you?", "b": "I am fine.", "c": "The fox jumps."},
    {"a": "The quick fox", "b": "jumps over the dog", "c": "today"},
]


@pytest.fixture
def read(tmp_path, tokenizer):
    def read(rows, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        chosen: dict[str, Any] = {"packing": False, "max_length": 96}
        chosen |= {"text_columns": "a,b,c"} | options
        config = Config(train=str(path), **chosen)
        return load_examples(config, tokenizer, 0, groups.Encoder)

    return read


@pytest.mark.parametrize("packing", [False, True])
def test_each_text_is_a_segment(read, tokenizer, packing):
    rows, *_ = read(ROWS, packing=packing)
    batch = rows.assemble(np.arange(len(rows)), len(rows) + 1, 96)
    assert "parts" not in batch
    assert batch["examples"].shape == (len(rows) + 1, 3 - len(rows), 3)
    assert (batch["examples"][-1] == -1).all()
    for row in range(len(rows)):
        for place, example in enumerate(batch["examples"][row, :, 0]):
            for part, column in enumerate("abc"):
                here = batch["segment_ids"][row] == 3 * place + part + 1
                ids = tokenizer(ROWS[example][column]).input_ids
                # Which this tokenizer, as decoders' do, does not put there itself.
                ids.append(tokenizer.eos_token_id)
                assert batch["input_ids"][row, here].tolist() == ids
                assert batch["positions"][row, here].tolist() == [*range(len(ids))]


def test_chats_need_no_columns(read, tokenizer):
    chat = {"conversations": ["How are you?", "I am fine.", "And you?"]}
    pair = {"prompt": "2 and 2 is ", "completion": "42"}
    rows, _, report = read([chat, pair, {"text": "alone"}], text_columns="")
    shown = [groups.show_example(tokenizer, rows.example(i)) for i in range(2)]
    assert shown == [
        "How are you?<eos>\nI am fine.<eos>",
        "2 and 2 is <eos>\n42<eos>",
    ]
    assert list(report.rejected) == ["a text without an answer"]


def test_long_texts_are_cut_or_go(read):
    long = ROWS[0] | {"b": "The quick brown fox jumps over the lazy dog. " * 9}
    _, _, report = read([long, *ROWS])
    [(reason, _)] = report.rejected.items()
    assert reason == "a text longer than its part of max_length, 32 tokens"
    cut, _, report = read([long, *ROWS], truncation="truncate")
    assert report.truncated == 1
    assert (cut.example(0).columns["parts"] == 1).sum() == 32


def test_one_column_is_too_few(read):
    with pytest.raises(UserError, match=r"data\.text_columns is 'a'"):
        read(ROWS, text_columns="a")

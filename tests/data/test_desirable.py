"""Answers that are good or bad: each beside an answer to another prompt."""

import json
from typing import Any

import pytest

from fjft.data import desirable, tokenize
from fjft.data.config import Config
from fjft.data.dataset import load_examples
from fjft.data.examples import Example
from fjft.data.templates import read_sample

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
ASKED = [{"role": "user", "content": "How are you?"}]
FINE = [{"role": "assistant", "content": "Fine."}]
TEXTS = [
    {"prompt": "2 + 2 is ", "completion": "4", "label": True},
    {"prompt": "5 + 5 is ", "completion": "10", "label": 1},
    {"prompt": "5 + 5 is ", "completion": "12, I think", "label": False},
]
CHATS = [
    {"prompt": ASKED, "completion": FINE, "label": False},
    {"prompt": ASKED * 2, "completion": FINE * 2, "label": True},
]


@pytest.fixture
def read(tmp_path, tokenizer):
    tokenizer.chat_template = TEMPLATE

    def read(rows, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        chosen: dict[str, Any] = {"packing": True, "max_length": 256} | options
        config = Config(train=str(path), **chosen)
        return load_examples(config, tokenizer, 0, desirable.Encoder)

    return read


def test_each_answer_stands_beside_that_to_another_prompt(read, tokenizer):
    rows = [TEXTS[0], CHATS[0], TEXTS[1], TEXTS[2], CHATS[1]]
    train, _, report = read(rows)
    assert report.formats == {"desirable": 3, "undesirable": 2}
    assert not report.warnings()
    # The third has the same prompt as the one before it; a chat's partner is a chat.
    for number, other in enumerate([3, 4, 0, 0, 1]):
        row = rows[number]
        columns = train.example(number).columns
        for answer, part in ((row, 0 if row["label"] else 1), (rows[other], 2)):
            text = {"prompt": row["prompt"], "completion": answer["completion"]}
            encoder = tokenize.Encoder(tokenizer, Config())
            [alone] = encoder.encode([read_sample(text)[1]])
            assert isinstance(alone, Example)
            here = columns["parts"] == part
            for column, values in alone.columns.items():
                assert columns[column][here].tolist() == values.tolist()
        assert set(columns["parts"]) == {0 if row["label"] else 1, 2}


def test_a_batch_says_which_answers_are_desirable(read):
    train, _, _ = read(TEXTS)
    assert train.bins is not None
    batch = train.assemble([0], 1, 256)
    for place, number in enumerate(train.bins[0]):
        is_desirable = bool(TEXTS[number]["label"])
        expected = [number, -1, number] if is_desirable else [-1, number, number]
        assert batch["examples"][0, place].tolist() == expected
        own = 3 * place + (1 if is_desirable else 2)
        assert {own, 3 * place + 3} <= set(batch["segment_ids"][0])


def test_answers_to_others_are_cut_and_do_not_count_as_such(read):
    rows = [TEXTS[0], {"prompt": "Count: ", "completion": "1 " * 20, "label": True}]
    train, _, report = read(rows, max_length=100)
    assert len(train.example(0)) <= 100
    assert report.examples == 2
    assert report.truncated == 0
    assert sum(report.end_tokens.values()) == 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "label": True}, "no columns 'prompt' and 'completion'"),
        ({"prompt": "a", "completion": "b"}, "neither true nor false in the column"),
        ({"prompt": "a", "completion": "b", "label": "good"}, "neither true nor"),
        ({"prompt": "a", "completion": "c " * 80, "label": True}, "longer than"),
        ({"prompt": ASKED, "completion": FINE, "label": True}, "no other prompt"),
    ],
)
def test_rows_that_cannot_be_used_say_why(read, row, reason):
    report = read([row, *TEXTS])[2]
    [(found, rejections)] = report.rejected.items()
    assert found.startswith(reason)
    assert rejections.count == 1

"""Preferences: two texts to an example, each encoded as if it were alone."""

import json
from typing import Any

import pytest

from fjft.data import preferences, tokenize
from fjft.data.config import Config
from fjft.data.dataset import load_examples
from fjft.data.examples import Example
from fjft.data.templates import read_sample

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASKED = [{"role": "user", "content": "How are you?"}]
GOOD, BAD = ([{"role": "assistant", "content": c}] for c in ("Fine.", "Go away, user."))


@pytest.fixture
def read(tmp_path, tokenizer):
    tokenizer.chat_template = TEMPLATE

    def read(rows, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        chosen: dict[str, Any] = {"packing": False, "max_length": 128} | options
        config = Config(train=str(path), **chosen)
        return load_examples(config, tokenizer, 0, preferences.Encoder)

    return read


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 + 2 is ", "chosen": "4", "rejected": "42, I think"},
        {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
        {"chosen": ASKED + GOOD, "rejected": ASKED + BAD},
    ],
    ids=["texts", "messages", "chats"],
)
def test_both_texts_are_encoded_as_alone(read, tokenizer, row):
    train, _, report = read([row])
    assert report.formats == {"preference": 1}
    assert not report.warnings()
    example = train.example(0)
    prompt = row.get("prompt", ASKED)
    for part, name in enumerate(("chosen", "rejected")):
        answer = row[name] if "prompt" in row else row[name][-1:]
        sample = read_sample({"prompt": prompt, "completion": answer})[1]
        [alone] = tokenize.Encoder(tokenizer, Config()).encode([sample])
        assert isinstance(alone, Example)
        here = example.columns["parts"] == part
        for column, values in alone.columns.items():
            assert example.columns[column][here].tolist() == values.tolist()
    shown = preferences.show_example(tokenizer, example)
    assert shown.count("\n【") + shown.count("【") >= 2
    batch = train.assemble([0], 1, 128)
    assert batch["examples"].tolist() == [[[0, 0]]]
    assert set(batch["segment_ids"][0]) == {0, 1, 2}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b"}, "no columns 'chosen' and 'rejected'"),
        ({"chosen": "b", "rejected": "c"}, "no column 'prompt'"),
        (
            {"chosen": ASKED + GOOD, "rejected": ASKED + ASKED + BAD},
            "chats that differ",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c " * 80}, "longer than"),
        ({"prompt": "a", "chosen": "", "rejected": "c"}, "empty"),
    ],
)
def test_rows_that_cannot_be_used_say_why(read, row, reason):
    report = read([row, {"prompt": "a", "chosen": "b", "rejected": "c"}])[2]
    [(found, rejections)] = report.rejected.items()
    assert found.startswith(reason)
    assert rejections.count == 1

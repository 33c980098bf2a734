"""Windows on contexts: where the answer lies in each, and what the notes say."""

import json
from typing import Any

import numpy as np
import pytest
import transformers

from fjft.data import questions
from fjft.data.config import Config
from fjft.data.dataset import load_examples
from fjft.errors import UserError

CONTEXT = " ".join(f"Word{n} is ({n * n})." for n in range(24))


def make_row(answer, context=CONTEXT, question="  What is it?"):
    answers = {"text": [answer, "other"], "answer_start": [context.index(answer), 0]}
    return {"question": question, "context": context, "answers": answers}


@pytest.fixture(scope="module")
def spelling_tokenizer(tmp_path_factory):
    """WordPiece that spells: every character is a token."""
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"().?"]
    for letter in "abcdefghijklmnopqrstuvwxyz0123456789":
        words += [letter, f"##{letter}"]
    path.write_text("\n".join(words))
    return transformers.BertTokenizer(str(path))


@pytest.fixture
def read(tmp_path, spelling_tokenizer):
    def read(rows, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        chosen: dict[str, Any] = {"max_length": 64, "doc_stride": 16, "packing": False}
        chosen |= {"text_columns": "question,context", "label_column": "answers"}
        config = Config(train=str(path), **chosen | options)
        return load_examples(config, spelling_tokenizer, 0, questions.Encoder)

    return read


def test_windows_are_the_tokenizers_and_hold_the_answer(read, spelling_tokenizer):
    answers = ["Word0", "(0).", "Word11 is (121)", "529", "441). Word22 is"]
    train, _, report = read([make_row(answer) for answer in answers])
    theirs = spelling_tokenizer(
        "What is it?",
        CONTEXT,
        truncation="only_second",
        max_length=64,
        stride=16,
        return_overflowing_tokens=True,
    )
    windows = len(theirs.input_ids)
    assert windows > 4
    assert report.rows_read * windows == report.examples == len(train.examples)
    for n, answer in enumerate(answers):
        held = 0
        for w in range(windows):
            example = train.examples[n * windows + w]
            ids = example.columns["input_ids"]
            for name in ("input_ids", "token_type_ids"):
                assert example.columns[name].tolist() == theirs[name][w]
            note = json.loads(train.examples.notes[n * windows + w])
            assert (note["question"], note["windows"]) == (n, windows)
            assert note["answers"] == [answer, "other"]
            assert note["context"] in CONTEXT
            start, end = example.target
            if (start, end) == (0, 0):
                assert answer not in note["context"]
                continue
            held += 1
            first, last = (note["offsets"][i - note["first"]] for i in (start, end))
            assert note["context"][first[0] : last[1]] == answer
            spelled = spelling_tokenizer.decode(ids[start : end + 1])
            assert spelled.replace(" ", "") == answer.replace(" ", "").lower()
        assert held >= 1
    shown = questions.show_example(spelling_tokenizer, train.examples[0])
    assert shown.endswith("→ word0")


def test_a_held_out_question_keeps_its_windows(read):
    rows = [make_row(f"Word{n}", question=f"  Is it {n}?") for n in range(6)]
    train, sets, _ = read(rows, eval_size=2.0)
    held_out = sets[""]
    asked = [
        {json.loads(part.examples.notes[i])["question"] for i in range(len(part))}
        for part in (train, held_out)
    ]
    assert not asked[0] & asked[1]
    assert asked[0] | asked[1] == set(range(6))
    batch = held_out.assemble(np.arange(2), 3, 64)
    assert batch["examples"].tolist() == [[[0]], [[1]], [[-1]]]
    assert batch["labels"].shape == (3, 1, 2)
    assert batch["labels"][2].tolist() == [[-100, -100]]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "x", "context": "y"}, "no answer in the column"),
        (
            make_row("Word0") | {"answers": {"text": []}},
            "no answer",
        ),
        (
            make_row("Word0") | {"answers": {"text": ["b"], "answer_start": [0]}},
            "the answer is not where",
        ),
        (make_row("Word0", question=" "), "empty"),
        (make_row("Word0", question="x" * 60), "the question leaves too little"),
    ],
)
def test_rows_that_cannot_be_used_say_why(read, row, reason):
    report = read([row, make_row("Word0")])[2]
    [(found, rejections)] = report.rejected.items()
    assert found.startswith(reason)
    assert rejections.count == 1


def test_options_that_do_not_fit_are_said(read):
    with pytest.raises(UserError, match=r"data\.text_columns"):
        read([make_row("Word0")], text_columns="question")
    with pytest.raises(UserError, match=r"data\.doc_stride = 61"):
        read([make_row("Word0")], doc_stride=61)

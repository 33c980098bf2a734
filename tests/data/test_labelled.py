"""Labelled texts: what the tokenizer makes of them, and which labels there are."""

import json
from typing import Any

import numpy as np
import pytest
import tokenizers

from fjft.data import labelled
from fjft.data.config import Config
from fjft.data.dataset import load_examples
from fjft.errors import UserError

ROWS = [
    {"text": "The quick brown fox", "label": "fast"},
    {"text": "jumps over the lazy dog", "label": "slow"},
    {"text": "how are you today?" * 9, "label": "fast"},
]


@pytest.fixture
def bert_like(tokenizer):
    """A tokenizer with special tokens and types around one text or two."""
    bos, eos = (("<bos>", tokenizer.bos_token_id), ("<eos>", tokenizer.eos_token_id))
    tokenizer.backend_tokenizer.post_processor = (
        tokenizers.processors.TemplateProcessing(
            single="<bos> $A <eos>",
            pair="<bos> $A <eos> $B:1 <eos>:1",
            special_tokens=[bos, eos],
        )
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


@pytest.fixture
def write(tmp_path):
    def write(rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def read(path, tokenizer, **options):
    chosen: dict[str, Any] = {"packing": False, "max_length": 128} | options
    config = Config(train=path, **chosen)
    return load_examples(config, tokenizer, 0, labelled.Encoder)


def test_ids_and_types_are_the_tokenizers_own(bert_like, write):
    rows = [
        {"a": "The fox jumps", "b": "over the dog", "kind": 1},
        {"a": "I am fine.", "b": "And you?", "kind": 0},
    ]
    train, _, report = read(
        write(rows), bert_like, text_columns="a,b", label_column="kind"
    )
    assert report.formats == {"labelled pair": 2}
    for i, row in enumerate(rows):
        theirs = bert_like(row["a"], row["b"])
        example = train.examples[i]
        for name in ("input_ids", "token_type_ids"):
            assert example.columns[name].tolist() == theirs[name]
        assert max(theirs["token_type_ids"]) == 1
        assert example.target == row["kind"]
    assert train.examples.labels == labelled.Labels(
        "single_label_classification", ("0", "1")
    )


@pytest.mark.parametrize("truncation", ["truncate", "drop"])
def test_long_texts_keep_their_special_tokens_or_go(bert_like, write, truncation):
    path = write(ROWS)
    train, _, report = read(path, bert_like, max_length=24, truncation=truncation)
    if truncation == "drop":
        assert (len(train.examples), report.rejected_rows) == (2, 1)
        return
    assert (len(train.examples), report.truncated) == (3, 1)
    cut = train.examples[2].columns["input_ids"].tolist()
    whole = bert_like(ROWS[2]["text"])["input_ids"]
    assert cut == [*whole[:23], bert_like.eos_token_id]


def test_labels_are_sorted_counted_and_shown(tokenizer, write):
    rows = [{"text": "x", "label": label} for label in (10, 9, 9, -2)]
    train, _, report = read(write(rows), tokenizer)
    labels = train.examples.labels
    assert labels is not None
    assert labels.names == ("-2", "9", "10")
    targets = [train.examples[i].target for i in range(4)]
    assert [int(t) for t in targets if t is not None] == [2, 1, 1, 0]
    assert report.labels == {"10": 1, "9": 2, "-2": 1}
    assert "  labels: -2 1, 10 1, 9 2" in report.describe()
    assert not report.warnings()
    shown = labelled.show_example(tokenizer, train.examples[0], labels)
    assert shown == "x → 10"


def test_several_labels_and_numbers(tokenizer, write):
    rows = [
        {"text": "x", "label": ["b", "a"], "score": 1.5},
        {"text": "y", "label": [], "score": "-2"},
        {"text": "z", "label": "c, b", "score": 0},
    ]
    train, *_ = read(write(rows), tokenizer, problem_type="multi_label_classification")
    labels, targets = train.examples.labels, train.examples.targets
    assert labels is not None
    assert targets is not None
    assert labels.names == ("a", "b", "c")
    assert targets.tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 1]]
    train, *_ = read(
        write(rows), tokenizer, problem_type="regression", label_column="score"
    )
    targets = train.examples.targets
    assert targets is not None
    assert targets.dtype == np.float32
    assert targets.tolist() == [[1.5], [-2.0], [0.0]]


def test_packed_rows_have_a_label_for_each_segment(tokenizer, write):
    packed, *_ = read(write(ROWS[:2]), tokenizer, packing=True, max_length=64)
    batch = packed.assemble(np.array([0]), 2, 64)
    labels = packed.examples.labels
    assert labels is not None
    assert batch["labels"].shape == (2, 2)
    assert sorted(batch["labels"][0]) == [0, 1]
    assert batch["labels"][1].tolist() == [-100, -100]
    for segment, label in enumerate(batch["labels"][0], 1):
        here = batch["segment_ids"][0] == segment
        row = ROWS[["fast", "slow"].index(labels.names[label])]
        assert batch["input_ids"][0, here].tolist() == tokenizer(row["text"]).input_ids


@pytest.mark.parametrize(
    ("row", "options", "reason"),
    [
        ({"text": " ", "label": "fast"}, {}, "empty"),
        ({"txt": "x", "label": "fast"}, {}, "no text in the column 'text'"),
        ({"text": "x"}, {}, "no label in the column 'label'"),
        ({"text": "x", "label": 0.5}, {}, "no label in the column 'label'"),
        (
            {"text": "x", "label": "odd"},
            {"label_names": "fast,slow"},
            "unknown label",
        ),
        ({"text": "x", "label": "a"}, {"problem_type": "regression"}, "no number"),
        ({"text": "x", "label": "nan"}, {"problem_type": "regression"}, "not a finite"),
    ],
)
def test_rows_that_cannot_be_used_say_why(tokenizer, write, row, options, reason):
    rows = (
        [row, {"text": "good", "label": 1}]
        if "problem_type" in options
        else [
            row,
            *ROWS,
        ]
    )
    report = read(write(rows), tokenizer, **options)[2]
    [(found, rejections)] = report.rejected.items()
    assert found.startswith(reason)
    assert rejections.count == 1


def test_one_label_is_none(tokenizer, write):
    with pytest.raises(UserError, match="nothing to tell apart"):
        read(write(ROWS[:1]), tokenizer)
    with pytest.raises(UserError, match=r"data\.text_columns"):
        read(write(ROWS), tokenizer, text_columns="a,b,c")
    with pytest.raises(UserError, match=r"data\.problem_type"):
        Config(problem_type="ranking")

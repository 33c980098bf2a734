"""Tagged words: which tokens have the tags, and what a CoNLL file is read as."""

import json
from typing import Any

import numpy as np
import pytest
import tokenizers

from fjft.data import tagged
from fjft.data.config import Config
from fjft.data.dataset import load_examples
from fjft.errors import UserError

ROWS = [
    {"tokens": ["The", "quick", "brown", "fox", "jumps"], "tags": list("OXYOO")},
    {"tokens": ["unbelievably", "lazy", "dogs"], "tags": list("YOX")},
]


@pytest.fixture
def read(tmp_path, tokenizer):
    def read(rows, suffix="jsonl", **options):
        path = tmp_path / f"rows.{suffix}"
        text = rows if isinstance(rows, str) else "\n".join(map(json.dumps, rows))
        path.write_text(text)
        chosen: dict[str, Any] = {"packing": False, "max_length": 64} | options
        chosen = {"text_columns": "tokens", "label_column": "tags"} | chosen
        return load_examples(
            Config(train=str(path), **chosen), tokenizer, 0, tagged.Encoder
        )

    return read


@pytest.mark.parametrize("add_special", [False, True])
@pytest.mark.parametrize("prefix_space", [False, True])
def test_the_first_token_of_each_word_has_its_tag(
    read, tokenizer, add_special, prefix_space
):
    """As with transformers' `word_ids`, which wants the space before the first word."""
    tokenizer.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=prefix_space, trim_offsets=not prefix_space
    )
    if add_special:
        special = [(t, tokenizer.convert_tokens_to_ids(t)) for t in ("<bos>", "<eos>")]
        template = tokenizers.processors.TemplateProcessing(
            single="<bos> $A <eos>", special_tokens=special
        )
        tokenizer.backend_tokenizer.post_processor = template
    train, _, report = read(ROWS)
    assert report.labels == {"O": 4, "X": 2, "Y": 2}
    for i, row in enumerate(ROWS):
        columns = train.examples[i].columns
        if not prefix_space:
            assert (
                columns["input_ids"].tolist()
                == tokenizer(" ".join(row["tokens"])).input_ids
            )
            tags = [train.examples.labels.names[t] for t in columns["labels"] if t >= 0]
            assert tags == row["tags"]
            continue
        tokenizer.add_prefix_space = True
        theirs = tokenizer(row["tokens"], is_split_into_words=True)
        assert columns["input_ids"].tolist() == theirs.input_ids
        words = theirs.word_ids()
        expected = [
            -100
            if word is None or word in words[:place]
            else "OXY".index(row["tags"][word])
            for place, word in enumerate(words)
        ]
        assert columns["labels"].tolist() == expected
    shown = tagged.show_example(tokenizer, train.examples[1], train.examples.labels)
    assert "/Y" in shown
    assert shown.count("/") == 3


def test_conll_files_and_numbers(read):
    text = "The\tDT\tO\nfox\tNN\tB-A\n\nfox\tNN\tB-A\n\t\nbad line\tO\nno_tag\n"
    train, _, report = read(text, "txt", text_columns="text")
    assert report.examples == 2
    assert report.labels == {"B-A": 2, "O": 1}
    assert list(report.rejected) == ["a line without a word and a tag"]
    rows = [{"tokens": ["The", "fox"], "tags": [1, 0]}]
    train, *_ = read(rows, label_names="B-A,O")
    labels = train.examples[0].columns["labels"]
    assert labels[labels >= 0].tolist() == [1, 0]
    assert train.examples.labels.names == ("B-A", "O")


def test_packed_rows_have_the_tags(read):
    packed, *_ = read(ROWS, packing=True)
    batch = packed.assemble(np.array([0]), 1, 64)
    labels = batch["labels"][0]
    assert sorted(labels[labels >= 0]) == [0, 0, 0, 0, 1, 1, 2, 2]
    assert (labels[batch["segment_ids"][0] == 0] == -100).all()


@pytest.mark.parametrize(
    ("row", "options", "reason"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, {}, "not a tag for each word"),
        ({"tokens": "a"}, {}, "a line without"),
        ({"words": ["a"], "tags": ["O"]}, {}, "no words and tags"),
        ({"tokens": [], "tags": []}, {}, "empty"),
        ({"tokens": ["a"], "tags": ["Z"]}, {"label_names": "O,X,Y"}, "unknown tag"),
        ({"tokens": ["a"] * 70, "tags": ["O"] * 70}, {}, "longer than max_length"),
    ],
)
def test_rows_that_cannot_be_used_say_why(read, row, options, reason):
    report = read([row, *ROWS], **options)[2]
    [(found, rejections)] = report.rejected.items()
    assert found.startswith(reason)
    assert rejections.count == 1


def test_long_texts_are_cut_if_asked(read):
    row = {"tokens": ["fox"] * 70, "tags": ["X"] * 70}
    train, _, report = read([row, *ROWS], truncation="truncate", max_length=16)
    assert report.truncated == 1
    assert len(train.examples[0].columns["labels"]) == 16


def test_one_tag_is_none(read):
    with pytest.raises(UserError, match="nothing to tell apart"):
        read([{"tokens": ["a"], "tags": ["O"]}])

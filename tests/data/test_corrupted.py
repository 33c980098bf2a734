"""Spans taken out of texts: nothing is lost, and as much goes as T5 takes."""

import collections
import itertools
import json
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_seq2seq

from fjft.data import corrupted
from fjft.data.config import Config
from fjft.data.dataset import load_examples
from fjft.errors import UserError

WORDS = [f"w{i}" for i in range(30)]


@pytest.fixture
def read(tmp_path):
    def read(texts, tokenizer=None, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        chosen: dict[str, Any] = {"packing": False, "max_length": 40} | options
        config = Config(train=str(path), **chosen)
        encoder = corrupted.Encoder
        return load_examples(
            config, tokenizer or tiny_seq2seq.make_tokenizer(12), 0, encoder
        )

    return read


def interleave(source, target, sentinels):
    """What both texts were made of; checks that each span stands where it should."""
    spans: dict[int, list[int]] = {}
    for token in target:
        if token in sentinels:
            spans[token] = []
        else:
            spans[next(reversed(spans))].append(token)
    assert list(spans) == sentinels[: len(spans)]
    assert [token for token in source if token in sentinels] == list(spans)
    whole = [spans.get(token, [token]) for token in source]
    return [token for part in whole for token in part], list(spans.values())


@pytest.mark.parametrize("length", [2, 3, 7, 20, 30])
@pytest.mark.parametrize("options", [{}, {"noise_density": 0.5}])
def test_both_texts_together_are_the_whole(read, length, options):
    tokenizer = tiny_seq2seq.make_tokenizer(12)
    train, *_ = read([" ".join(WORDS[:length])], **options)
    sentinels = [tokenizer.convert_tokens_to_ids(f"<extra_id_{i}>") for i in range(12)]
    density = options.get("noise_density", 0.15)
    num_taken = min(max(round(length * density), 1), length - 1)
    num_spans = max(round(num_taken / 3), 1)
    seen = set()
    for epoch in range(20):
        example = train.example(0, (5, epoch))
        again = train.example(0, (5, epoch))
        source, target = (
            [t for t in example.columns[name].tolist() if t >= 0]
            for name in ("input_ids", "labels")
        )
        assert example.columns["labels"].tolist() == again.columns["labels"].tolist()
        assert len(example) == train.lengths[0]
        assert source.pop() == target.pop() == tokenizer.eos_token_id
        whole, spans = interleave(source, target, sentinels)
        assert whole == tokenizer(" ".join(WORDS[:length])).input_ids
        assert (len(spans), sum(map(len, spans))) == (num_spans, num_taken)
        assert all(spans)
        touching = itertools.pairwise(source)
        assert not any({a, b} <= set(sentinels) for a, b in touching)
        seen.add((source[0] in sentinels, source[-1] in sentinels))
    assert len(seen) > 1


def test_lengths_are_those_of_t5():
    """568 tokens are read as 512 and written as 114 (Raffel et al.'s pretraining)."""
    sentinels = np.arange(100, dtype=np.int32)
    corruption = corrupted.Corruption(sentinels, 1, density=0.15, mean_span=3.0)
    assert corruption.longest_text(512) == 568
    noise, spans = corruption.count(np.array([568]))
    assert (noise + spans + 1).tolist() == [114]
    assert corruption.measure(np.array([568, 569])).tolist() == [512, 513]


def test_all_cuts_are_equally_likely():
    random = np.random.default_rng(0)
    draws = (corrupted._cut_at_random(4, 3, random) for _ in range(3000))
    counts = collections.Counter(tuple(draw.tolist()) for draw in draws)
    assert counts.keys() == {(1, 1, 2), (1, 2, 1), (2, 1, 1)}
    assert min(counts.values()) > 900


def test_long_texts_become_several_examples_that_fill_rows(read):
    train, _, report = read([" ".join(WORDS * 3), "w1 w2"], packing=True, max_length=28)
    pieces = [train.examples[i].columns["input_ids"].tolist() for i in range(4)]
    assert list(map(len, pieces)) == [30, 30, 30, 2]
    assert report.examples == 4
    # 30 tokens are read as 28 and written as 8.
    assert sorted(train.lengths.tolist()) == [3, 28, 28, 28]
    batch = train.assemble([0, 1, 2, 3], 4, 28)
    assert (batch["segment_ids"] > 0).sum() == 3 + 3 * 28


def test_what_cannot_be_is_said(read):
    with pytest.raises(UserError, match="no <extra_id_0>"):
        read(["w1 w2"], tokenizer=tiny.make_tokenizer())
    with pytest.raises(UserError, match=r"only 1 tokens.*mean_noise_span_length"):
        read(["w1 w2"], tokenizer=tiny_seq2seq.make_tokenizer(1))
    with pytest.raises(UserError, match=r"max_length = 2 leaves no room"):
        read(["w1 w2"], max_length=2)
    with pytest.raises(UserError, match=r"noise_density is 1\.0"):
        read(["w1 w2"], noise_density=1.0)
    report = read(["w1", "w1 w2"])[2]
    assert report.rejected.keys() == {"fewer than two tokens"}

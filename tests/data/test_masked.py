"""Hidden tokens: which, how often, and the same whenever they are drawn again."""

import json
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from fjft.data import masked
from fjft.data.config import Config
from fjft.data.dataset import load_examples
from fjft.data.loader import Loader
from fjft.errors import UserError

TEXT = "the quick brown fox jumps over unbelievably lazy dogs today"
WORDS = TEXT.split()


@pytest.fixture(scope="module")
def bert_tokenizer(tmp_path_factory):
    """WordPiece; every word but two is one token."""
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = ["un", "##believ", "##ably", "dog", "##s"]
    path.write_text("\n".join([*special, *pieces, *WORDS[:6], *WORDS[7:8], "today"]))
    return transformers.BertTokenizer(str(path))


@pytest.fixture
def read(tmp_path, bert_tokenizer):
    def read(texts, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        chosen: dict[str, Any] = {"packing": False, "max_length": 32} | options
        config = Config(train=str(path), **chosen)
        return load_examples(config, bert_tokenizer, 0, masked.Encoder)

    return read


def test_long_texts_become_several_examples(read, bert_tokenizer):
    train, _, report = read([" ".join(WORDS * 5), "today"])
    assert (report.rows_read, report.examples) == (2, 4)
    assert train.examples.row_numbers.tolist() == [0, 0, 0, 1]
    pieces = [train.examples[i].columns["input_ids"].tolist() for i in range(3)]
    cls, sep = bert_tokenizer.cls_token_id, bert_tokenizer.sep_token_id
    assert all(piece[0] == cls and piece[-1] == sep for piece in pieces)
    assert len(pieces[0]) == 32
    inner = [i for piece in pieces for i in piece[1:-1]]
    assert inner == bert_tokenizer(" ".join(WORDS * 5)).input_ids[1:-1]


def test_as_much_is_hidden_as_transformers_hides(read, bert_tokenizer):
    """Shares of some 6,000 tokens."""
    train, *_ = read([" ".join(WORDS[:8])] * 600, mlm_probability=0.3)
    batch = Loader(train, 600, seed=1).assemble(0)
    ids = np.array([train.examples[0].columns["input_ids"]] * 600)
    length = ids.shape[1]
    collator = transformers.DataCollatorForLanguageModeling(
        bert_tokenizer, mlm_probability=0.3, seed=0
    )
    theirs = collator([{"input_ids": row.tolist()} for row in ids])

    def shares(inputs, labels):
        learned = labels != -100
        assert (labels[learned] == ids[learned]).all()
        assert (inputs[~learned] == ids[~learned]).all()
        assert not learned[:, [0, -1]].any()  # [CLS] and [SEP]
        masked = inputs[learned] == bert_tokenizer.mask_token_id
        kept = inputs[learned] == labels[learned]
        return learned.mean(), masked.mean(), kept.mean()

    ours = shares(batch["input_ids"][:, :length], batch["labels"][:, :length])
    np.testing.assert_allclose(
        ours, shares(*(theirs[k].numpy() for k in ("input_ids", "labels"))), atol=0.05
    )
    np.testing.assert_allclose(ours[1:], [0.8, 0.1 + 0.1 / 20], atol=0.04)
    assert isinstance(theirs["labels"], torch.Tensor)


def test_whole_words_are_hidden_together(read, bert_tokenizer):
    train, *_ = read([TEXT] * 200, whole_word_mask=True)
    labels = Loader(train, 200).assemble(0)["labels"] != -100
    tokens = bert_tokenizer.convert_ids_to_tokens(
        train.examples[0].columns["input_ids"]
    )
    first = tokens.index("un")
    assert tokens[first : first + 3] == ["un", "##believ", "##ably"]
    assert 0 < labels[:, first].sum() < 100
    assert (labels[:, [first + 1, first + 2]] == labels[:, [first]]).all()


def test_draws_follow_from_seed_epoch_and_example_alone(read):
    texts = [" ".join(WORDS[n:]) for n in range(8)]
    padded, packed = read(texts)[0], read(texts, packing=True, max_length=40)[0]

    def learned(rows, batch_size, seed=0, epoch=0):
        """What is hidden, by what is learned of each text's tokens."""
        loader = Loader(rows, batch_size, seed=seed, shuffle=False)
        first = epoch * loader.batches_per_epoch
        found = set()
        for n in range(first, first + loader.batches_per_epoch):
            batch = loader.assemble(n)
            for row, segments in enumerate(batch["segment_ids"]):
                for s in range(1, segments.max() + 1):
                    here = segments == s
                    columns = batch["input_ids"][row, here], batch["labels"][row, here]
                    found.add(tuple(map(tuple, columns)))
        return found

    once = learned(padded, 2)
    assert len(once) == 8
    assert learned(padded, 8) == learned(packed, 2) == once
    assert learned(padded, 2, seed=1) != once
    assert learned(padded, 2, epoch=1) != once
    assert all(any(x != -100 for x in labels) for _, labels in once)


def test_what_cannot_be_masked_is_said(read, tokenizer, tmp_path):
    with pytest.raises(UserError, match="no mask token"):
        masked.Encoder(tokenizer, Config())
    with pytest.raises(UserError, match="no room"):
        read(["today"], max_length=2)
    with pytest.raises(UserError, match="mlm_probability"):
        Config(mlm_probability=0.0)

"""Tokenizers trained on English and Chinese: what they say, they say again."""

import json
import unicodedata

import pytest
import transformers

from fjft.data.config import Config
from fjft.data.vocabulary import AROUND, KINDS, SENTINELS, read_texts, train_tokenizer
from fjft.errors import UserError

LANGUAGES = ("english", "chinese")
VOCAB_SIZE = 3000


@pytest.fixture(scope="module")
def texts():
    """Small talk in two languages."""
    sources = [f"package:chatterbot_corpus/data/{name}/*.yml" for name in LANGUAGES]
    return list(read_texts(Config(train=tuple(sources))))


@pytest.fixture(scope="module", params=KINDS)
def trained(request, texts):
    return request.param, train_tokenizer(request.param, texts, VOCAB_SIZE, "encoder")


def test_texts_come_back(trained, texts):
    kind, tokenizer = trained
    assert 2000 < len(tokenizer) <= VOCAB_SIZE
    special = ["pad_token", "bos_token", "eos_token", "unk_token", "mask_token"]
    assert [getattr(tokenizer, f"{name}_id") for name in special] == [0, 1, 2, 3, 4]
    unknown, total = 0, 0
    for text in texts[::20]:
        ids = tokenizer(text).input_ids
        assert (ids[0], ids[-1]) == (1, 2)
        unknown, total = unknown + ids.count(3), total + len(ids)
        said = tokenizer.decode(ids, skip_special_tokens=True)
        if kind == "bpe":
            assert said == text
        elif 3 not in ids:
            # Others do not know how many spaces there were, or how a form was written.
            both = (unicodedata.normalize("NFKC", t).split() for t in (said, text))
            assert len({"".join(words) for words in both}) == 1
    assert unknown < 0.01 * total
    # Words have become tokens, and in BERT's way no Chinese ones.
    assert len(tokenizer.tokenize("What is the computer?")) <= 6
    assert len(tokenizer.tokenize("人工智能")) <= 4


def test_bytes_know_every_text(texts):
    tokenizer = train_tokenizer("bpe", texts, 400, "decoder")
    text = "Ω ≠ 🦜\n\tžluťoučký  kůň"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] != tokenizer.eos_token_id


@pytest.mark.parametrize("form", AROUND)
def test_files_load_in_transformers(texts, form, tmp_path):
    tokenizer = train_tokenizer("bpe", texts, 400, form)
    tokenizer.save_pretrained(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("a b", "c").input_ids == tokenizer("a b", "c").input_ids
    sentinels = set(SENTINELS) & loaded.get_vocab().keys()
    assert len(sentinels) == (100 if form == "encoder-decoder" else 0)


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        ("bpe", 200, "at least 261 tokens, the model only 200"),
        ("unigram", 400, r"cannot be trained.*raise model\.sizes\.vocab_size"),
        ("wordpiece", 6, "at least"),
    ],
)
def test_too_few_tokens_are_refused(texts, kind, size, message):
    with pytest.raises(UserError, match=message):
        train_tokenizer(kind, texts, size, "decoder")


def test_texts_are_found_in_every_column(tmp_path):
    row = {"text": "a", "n": 3, "messages": [{"role": "user", "content": "b"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert list(read_texts(Config(train=str(tmp_path / "rows.jsonl")))) == [
        "a",
        "user",
        "b",
    ]

"""Tokenizers said in GGUF's metadata and read back: ids, merges and templates equal."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from test_tokenizer import SMOLLM2, TEXTS, byte_level, sentencepiece

from fjft.checkpoint.gguf import GgufSource
from fjft.checkpoint.gguf_tokenizer import check_tokenizer, tokenizer_keys
from fjft.checkpoint.source import open_model
from fjft.checkpoint.tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNUSED,
    USER_DEFINED,
    WORD_RULES,
    build_tokenizer,
)
from fjft.errors import UserError

NOWHERE = Path("x.gguf")
HEAD = {"general.architecture": "llama", "llama.context_length": 100}
MIXED = [*TEXTS, "<s>a b<s>", "中文没有空格。", "🙂‍↔️ x 👩🏽‍💻", "<t>  <t>\n<s> x"]


def config(size: int, **ids: Any) -> Any:
    """A config with a vocabulary of this size."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    none: Any = dict.fromkeys(names)
    return transformers.LlamaConfig(vocab_size=size, **none | ids)


def spec(tokenizer) -> dict:
    return json.loads(tokenizer.backend_tokenizer.to_str())


@pytest.mark.parametrize("pre", list(WORD_RULES))
def test_every_rule_is_known_by_what_it_does(pre):
    metadata = byte_level(pre)
    first = build_tokenizer(NOWHERE, metadata)
    keys = tokenizer_keys(first, config(264), None)
    assert WORD_RULES[keys["tokenizer.ggml.pre"]] == WORD_RULES[pre]
    for key in ("model", "tokens", "token_type", "merges", "bos_token_id"):
        assert keys[f"tokenizer.ggml.{key}"] == metadata[f"tokenizer.ggml.{key}"]
    again = build_tokenizer(NOWHERE, HEAD | keys)
    assert spec(again) == spec(first)
    for text in MIXED:
        assert again(text).input_ids == first(text).input_ids
    assert check_tokenizer(NOWHERE, HEAD | keys, first) == []


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_comes_back_from_its_merges(prefix):
    metadata = sentencepiece(add_space_prefix=prefix, add_bos_token=prefix)
    first = build_tokenizer(NOWHERE, metadata)
    size = len(metadata["tokenizer.ggml.tokens"])
    keys = tokenizer_keys(first, config(size), None)
    for key in ("model", "tokens", "token_type", "unknown_token_id", "eos_token_id"):
        assert keys[f"tokenizer.ggml.{key}"] == metadata[f"tokenizer.ggml.{key}"]
    assert keys["tokenizer.ggml.add_space_prefix"] is prefix
    assert keys["tokenizer.ggml.add_bos_token"] is prefix
    again = build_tokenizer(NOWHERE, HEAD | keys)
    assert spec(again) == spec(first)
    for text in [*MIXED, "hello world held", "lolllowheel</s> hello"]:
        assert again(text).input_ids == first(text).input_ids
    # Whatever is joined earlier scores better, as in the scores it was made from.
    ranked = [
        sorted(zip(scores[259:], range(size), strict=False), reverse=True)
        for scores in (
            metadata["tokenizer.ggml.scores"],
            keys["tokenizer.ggml.scores"],
        )
    ]
    joined = {"".join(pair) for pair in spec(first)["model"]["merges"]}
    words = metadata["tokenizer.ggml.tokens"][259:]
    old, new = ([words[n] for _, n in r if words[n] in joined] for r in ranked)
    assert old == new


def gemma_like() -> transformers.PreTrainedTokenizerFast:
    """Gemma's form: runs of spaces are tokens of their own, one score for all."""
    runs = [SPACE * n for n in (2, 3, 4)] + ["\n" * n for n in (2, 3)]
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<tool>", *runs]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += [SPACE, "\n", "a", "b", SPACE + "a", "ab", SPACE + "ab"]
    merges = [
        (SPACE * 3, SPACE),
        (SPACE * 2, SPACE * 2),
        (SPACE * 2, SPACE),
        ("\n" * 2, "\n"),
        (SPACE, SPACE * 3),
        (SPACE, SPACE * 2),
        ("\n", "\n" * 2),
        (SPACE, SPACE),
        ("\n", "\n"),
        (SPACE, "a"),
        ("a", "b"),
        (SPACE + "a", "b"),
        (SPACE, "ab"),
    ]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {piece: number for number, piece in enumerate(pieces)},
            merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = tokenizers.normalizers.Replace(" ", SPACE)  # pyright: ignore[reportAttributeAccessIssue]
    plain = [tokenizers.AddedToken(t, normalized=False) for t in ["<tool>", *runs]]
    backend.add_tokens(plain)
    # Gemma 3's tokenizer has a token that its text model has no row for.
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        extra_special_tokens=["<image>"],
        chat_template="{{ messages }}",
    )


def test_gemma_s_runs_of_spaces():
    first = gemma_like()
    size = len(first) - 1
    keys = tokenizer_keys(first, config(size), {"eos_token_id": [1, 4]})
    tokens, kinds = (keys[f"tokenizer.ggml.{k}"] for k in ("tokens", "token_type"))
    assert tokens[5:8] == ["  ", "   ", "    "]
    assert kinds[4:10] == [USER_DEFINED] * 6
    assert kinds[:3] == [CONTROL] * 3
    assert (kinds[10], kinds[-1], len(tokens)) == (BYTE, NORMAL, size)
    assert keys["tokenizer.ggml.eot_token_id"] == 4
    again = build_tokenizer(NOWHERE, HEAD | keys)
    assert spec(again)["model"]["merges"] == spec(first)["model"]["merges"]
    vocab = {token: n for token, n in first.get_vocab().items() if n < size}
    assert again.get_vocab() == vocab
    for text in ["ab  a    ab\n\n\nb", "     a<tool>  <bos> ab", "é 🙂", *TEXTS]:
        assert again(text, add_special_tokens=False).input_ids == (
            first(text, add_special_tokens=False).input_ids
        )
    assert check_tokenizer(NOWHERE, HEAD | keys, first) == []
    assert again.chat_template == first.chat_template


def test_rows_without_a_token_get_a_filler():
    first = build_tokenizer(NOWHERE, byte_level("qwen2"))
    keys = tokenizer_keys(first, config(300), None)
    assert keys["tokenizer.ggml.token_type"][262:] == [UNUSED] * 38
    again = build_tokenizer(NOWHERE, HEAD | keys)
    assert again.get_vocab() == first.get_vocab()
    with pytest.raises(UserError, match=r"id 25\d, the model's vocabulary ends at 257"):
        tokenizer_keys(first, config(257), None)


def test_special_ids_of_the_config_fill_in():
    first = build_tokenizer(NOWHERE, byte_level("qwen2", bos_token_id=None))
    ids = {"bos_token_id": 7, "eos_token_id": [9, 8], "pad_token_id": 99999}
    keys = tokenizer_keys(first, config(264, **ids), {"eos_token_id": [8, 260]})
    assert keys["tokenizer.ggml.bos_token_id"] == 7
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert keys["tokenizer.ggml.eos_token_id"] == 260
    assert keys["tokenizer.ggml.eot_token_id"] == 8
    assert keys["tokenizer.ggml.eom_token_id"] == 9
    assert "tokenizer.ggml.padding_token_id" not in keys


def test_named_templates_come_back():
    first = build_tokenizer(NOWHERE, byte_level("gpt-2"))
    for template in ({"default": "a", "tools": "b"}, "c", None):
        first.chat_template = template
        keys = tokenizer_keys(first, config(264), None)
        again = build_tokenizer(NOWHERE, HEAD | keys)
        assert again.chat_template == first.chat_template


def test_what_cannot_be_said_is_an_error():
    first = build_tokenizer(NOWHERE, byte_level("gpt-2"))
    cut = tokenizers.pre_tokenizers  # pyright: ignore[reportAttributeAccessIssue]
    first.backend_tokenizer.pre_tokenizer = cut.ByteLevel(add_prefix_space=True)
    with pytest.raises(UserError, match=r"no known name.*gpt-2, smollm"):
        tokenizer_keys(first, config(264), None)
    # A merge that no score can give: "he" is known, and never joined.
    second = gemma_like()
    model = spec(second)
    model["model"]["merges"].remove([SPACE, "ab"])
    second.backend_tokenizer.from_str(json.dumps(model))
    other = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(model))
    )
    with pytest.raises(UserError, match="merges are not SentencePiece's"):
        tokenizer_keys(other, config(len(second)), None)


def test_a_tokenizer_that_is_read_back_otherwise_is_an_error():
    first = build_tokenizer(NOWHERE, byte_level("gpt-2"))
    keys = tokenizer_keys(first, config(264), None)
    broken = HEAD | keys | {"tokenizer.ggml.merges": ["1 2"]}
    with pytest.raises(UserError, match="in another way than it does"):
        check_tokenizer(NOWHERE, broken, first)


def test_another_rule_for_spaces_is_a_warning():
    metadata = sentencepiece()
    first = build_tokenizer(NOWHERE, metadata)
    cut = tokenizers.pre_tokenizers  # pyright: ignore[reportAttributeAccessIssue]
    first.backend_tokenizer.normalizer = tokenizers.normalizers.Replace(" ", SPACE)  # pyright: ignore[reportAttributeAccessIssue]
    first.backend_tokenizer.pre_tokenizer = cut.Metaspace(
        prepend_scheme="first", split=False
    )
    size = len(metadata["tokenizer.ggml.tokens"])
    keys = tokenizer_keys(first, config(size), None)
    assert keys["tokenizer.ggml.add_space_prefix"] is True
    (warning,) = check_tokenizer(NOWHERE, HEAD | keys, first)
    assert "rule for spaces" in warning


def test_smollm2_s_keys_are_those_of_its_file():
    model = open_model(SMOLLM2)
    assert isinstance(model.tensors, GgufSource)
    keys = tokenizer_keys(model.load_tokenizer(), model.config, model.generation_config)
    for key, value in keys.items():
        if key != "tokenizer.ggml.add_eos_token":
            assert model.tensors.metadata[key] == value, key

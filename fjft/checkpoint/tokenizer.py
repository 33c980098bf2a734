"""Builds a Hugging Face tokenizer from a GGUF file's metadata.

A GGUF file keeps the vocabulary, the merges and the special tokens, but of the rule
that cuts text into words only a name, so the rules stand here.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fjft.errors import UserError

# Token types of the format.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's stand-in for a space

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class WordRule:
    """How a byte-level vocabulary's text is prepared for its merges.

    Attributes:
      words: A regex that matches words; None is GPT-2's, built into `tokenizers`.
      lone_digits: Whether each digit is first made a word of its own.
      nfc: Whether text is first put into Unicode's composed form.
      whole_words: Whether a word in the vocabulary is taken whole, merges or not.
      add_bos: Whether a sequence starts with BOS when the file does not say.
    """

    words: str | None = None
    lone_digits: bool = False
    nfc: bool = False
    whole_words: bool = False
    add_bos: bool = False


LLAMA3_RULE = WordRule(words=LLAMA3_WORDS, whole_words=True, add_bos=True)
QWEN2_RULE = WordRule(words=QWEN2_WORDS, nfc=True)

# tokenizer.ggml.pre of the file -> rule
WORD_RULES = {
    "gpt-2": WordRule(),
    "smollm": WordRule(lone_digits=True),
    "llama-bpe": LLAMA3_RULE,
    "llama3": LLAMA3_RULE,
    "llama-v3": LLAMA3_RULE,
    "qwen2": QWEN2_RULE,
    "deepseek-r1-qwen": QWEN2_RULE,
    "tekken": WordRule(words=TEKKEN_WORDS, whole_words=True, add_bos=True),
}


def build_tokenizer(path: Path, metadata: Mapping[str, Any]) -> Any:
    """Builds the tokenizer, with its chat template and special tokens.

    Args:
      path: The file, for messages.
      metadata: Its key-values.

    Returns:
      A `transformers.PreTrainedTokenizerFast`.

    Raises:
      UserError: The file has no tokenizer, or one whose rules are not known.
    """
    from transformers import PreTrainedTokenizerFast

    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama") or "tokenizer.ggml.tokens" not in metadata:
        raise UserError(
            f"{path} has a tokenizer of kind {kind!r}; from GGUF these are read: gpt2 "
            f"(byte-level BPE), llama (SentencePiece BPE)"
        )
    tokens, types = _vocabulary(metadata)
    if kind == "gpt2":
        tokenizer, add_bos = _byte_level(path, metadata, tokens)
    else:
        tokenizer, add_bos = _sentencepiece(metadata, tokens, types), True
    _add_whole_tokens(tokenizer, tokens, types)
    flags = {
        "add_bos_token": metadata.get("tokenizer.ggml.add_bos_token", add_bos),
        "add_eos_token": metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    architecture = metadata["general.architecture"]
    options: dict[str, Any] = _special_tokens(metadata, tokens) | flags
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=metadata[f"{architecture}.context_length"],
        clean_up_tokenization_spaces=False,
        chat_template=_chat_template(metadata),
        **options,
    )


def _vocabulary(metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Tokens and their types, without the filler that rounds up the embedding."""
    tokens = list(metadata["tokenizer.ggml.tokens"])
    types = list(metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens)))
    while types and types[-1] == UNUSED and re.fullmatch(r"\[PAD\d+\]", tokens[-1]):
        tokens.pop()
        types.pop()
    if metadata["tokenizer.ggml.model"] == "llama":
        # llama.cpp finds these before it replaces spaces, so it keeps them as spaces.
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True)):
            if kind == USER_DEFINED and set(token) == {" "}:
                tokens[number] = SPACE * len(token)
    return tokens, types


def _byte_level(path: Path, metadata: Mapping[str, Any], tokens: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    name = metadata.get("tokenizer.ggml.pre")
    if name not in WORD_RULES or "tokenizer.ggml.merges" not in metadata:
        raise UserError(
            f"{path} cuts text into words by the rule {name!r}, which is not known; "
            f"the rules that are: {', '.join(WORD_RULES)}; give the original model's "
            f"tokenizer as a directory instead"
        )
    rule = WORD_RULES[name]
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=rule.whole_words,
        )
    )
    tokenizer.pre_tokenizer = word_cutter(rule)
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, rule.add_bos


def word_cutter(rule: WordRule) -> Any:
    """The `tokenizers.pre_tokenizers` that cut text into words by a rule."""
    from tokenizers import Regex
    from tokenizers import pre_tokenizers as cut

    steps: list[Any] = []
    if rule.lone_digits:
        steps.append(cut.Digits(individual_digits=True))
    if rule.words is not None:
        steps.append(cut.Split(Regex(rule.words), behavior="isolated"))
    steps.append(cut.ByteLevel(add_prefix_space=False, use_regex=rule.words is None))
    return cut.Sequence(steps)


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int]
) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    vocab = {token: number for number, token in enumerate(tokens)}
    scores = metadata["tokenizer.ggml.scores"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=derive_merges(tokens, scores, types),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", SPACE)
    start = [normalizers.Prepend(SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*start, spaces])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    end = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([*steps, *end])
    return tokenizer


def derive_merges(
    tokens: list[str], scores: list[float], types: list[int]
) -> list[tuple[str, str]]:
    """Lists the merges that make SentencePiece's choices: best score first.

    SentencePiece joins the neighbours whose joined piece scores best, so every way to
    cut a piece into two pieces is a merge with that piece's rank.

    `["a", "b", "ab"]`, scores `[0, -1, -2]` gives `[("a", "b")]`.
    """
    places = {token: number for number, token in enumerate(tokens)}
    found = []
    for token, score, kind in zip(tokens, scores, types, strict=False):
        if kind not in (NORMAL, USER_DEFINED):
            continue
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        pairs = [pair for pair in cuts if pair[0] in places and pair[1] in places]
        pairs.sort(key=lambda pair: (places[pair[0]], places[pair[1]]))
        found.extend((score, pair) for pair in pairs)
    # Among equals the order that transformers' own conversion gives.
    found.sort(key=lambda one: (one[0], *map(len, one[1])), reverse=True)
    return [pair for _, pair in found]


def _add_whole_tokens(tokenizer: Any, tokens: list[str], types: list[int]) -> None:
    """Makes the tokenizer find control and user-defined tokens before it cuts text."""
    from tokenizers import AddedToken

    control, plain = (
        [
            AddedToken(token, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in kinds
        ]
        for kinds in ((CONTROL, UNKNOWN), (USER_DEFINED,))
    )
    # Thousands at once: every call rebuilds what finds them.
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens(plain)


def _special_tokens(
    metadata: Mapping[str, Any], tokens: list[str]
) -> dict[str, str | None]:
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    names |= {"sep": "seperator", "cls": "cls", "mask": "mask"}  # the format's spelling
    ids = {
        short: metadata.get(f"tokenizer.ggml.{long}_token_id")
        for short, long in names.items()
    }
    # None, not absent: transformers would fill in <s> and </s>.
    return {
        f"{short}_token": None if number is None else tokens[number]
        for short, number in ids.items()
    }


def _chat_template(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    key = "tokenizer.chat_template"
    named = {
        name: metadata[f"{key}.{name}"]
        for name in metadata.get("tokenizer.chat_templates", [])
        if f"{key}.{name}" in metadata
    }
    if named and key in metadata:
        return {"default": metadata[key]} | named
    return metadata.get(key)

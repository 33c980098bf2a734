"""Says a Hugging Face tokenizer in GGUF's metadata: the reverse of `tokenizer`.

Of the rule that cuts text into words GGUF keeps a name, of SentencePiece's merges only
scores; both are found from what the tokenizer does, and what was found is tried.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fjft.checkpoint.tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WORD_RULES,
    build_tokenizer,
    derive_merges,
    word_cutter,
)
from fjft.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Text in which the known rules, and others that come near, differ.
PROBES = (
    "Hello world, it's 2024! Don't you're WE'LL they've I'd",
    "no leading  and   trailing  \n\n\ttabs\t\t\r\n \n  x \n ",
    "x1y22z333 3.14159 1,000,000 12345678 ½ ٣٤ Ⅷ",
    "日本語のテキスト 中文分詞。한국어 émigré naïve e\u0301 🙂👍🏽 א ب ไทย",
    "def f(self, x):\n    return {'a': x ** 2}  # ok\n\n\n\tassert x != y/*z*/\n",
    "camelCase HTTPServer <b>&amp;</b> a/b\\c ~~~ ___ ... ?!?! $5.00 100% @x #y",
)
# GGUF's names of special tokens; the format spells `seperator` so.
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
SPECIAL |= {"sep": "seperator", "cls": "cls", "mask": "mask"}


def tokenizer_keys(
    tokenizer: Any,
    config: "PretrainedConfig",
    generation_config: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The metadata that says what a tokenizer and its chat template are.

    Args:
      tokenizer: A fast tokenizer of transformers.
      config: The model's, for the size of its vocabulary and the ids of special tokens
        that the tokenizer does not name.
      generation_config: For the tokens that end an answer.

    Raises:
      UserError: A tokenizer of another kind, or one that the format has no words for.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spec = json.loads(backend.to_str()) if backend is not None else {}
    model = spec.get("model", {})
    if backend is None or model.get("type") != "BPE":
        raise UserError(
            f"a tokenizer of kind {model.get('type', type(tokenizer).__name__)} is not "
            f"written as GGUF; byte-level BPE and SentencePiece BPE are"
        )
    tokens, types = _vocabulary(tokenizer, spec, config.vocab_size)
    merges = [
        (*pair.split(" "),) if isinstance(pair, str) else tuple(pair)
        for pair in model["merges"]
    ]
    if model["byte_fallback"]:
        found = _sentencepiece(backend, tokens, types, merges)
    else:
        found = {
            "model": "gpt2",
            "pre": _name_rule(backend, spec),
            "tokens": tokens,
            "token_type": types,
            "merges": [" ".join(pair) for pair in merges],
        }
    ids = _special_ids(tokenizer, config, generation_config)
    flags = _added_ends(tokenizer, ids)
    keys = {f"tokenizer.ggml.{key}": value for key, value in (found | flags).items()}
    keys |= {f"tokenizer.ggml.{name}_token_id": one for name, one in ids.items()}
    return keys | _chat_template(tokenizer.chat_template)


def check_tokenizer(
    path: Path, metadata: Mapping[str, Any], tokenizer: Any
) -> list[str]:
    """Reads a tokenizer back from metadata and compares what both say of some text.

    Returns:
      Warnings: sentences about text at whose beginning, or beside whose special
      tokens, GGUF's rule for spaces is another than the tokenizer's.

    Raises:
      UserError: They cut other text differently.
    """
    again = build_tokenizer(path, metadata)
    known = again.get_vocab()
    special = [token for token in tokenizer.all_special_tokens if token in known]
    edges = [" leading", *(f"{one}a b{one}  c {one}\n" for one in special)]
    plain, beside = (
        [one for one in texts if again(one).input_ids != tokenizer(one).input_ids]
        for texts in (PROBES, edges)
    )
    if plain:
        raise UserError(
            f"as GGUF the tokenizer would cut {plain[0]!r} in another way than it "
            f"does; write a Hugging Face directory instead"
        )
    return [
        f"programs that read GGUF cut {one!r} in another way than this tokenizer does: "
        f"their rule for spaces is another"
        for one in beside[:1]
    ]


def _vocabulary(
    tokenizer: Any, spec: Mapping[str, Any], size: int
) -> tuple[list[str], list[int]]:
    """Every row of the embedding has a token; those that no token has get a filler."""
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [UNUSED] * size
    added = {one["id"]: one for one in spec["added_tokens"]}
    unknown = spec["model"].get("unk_token") or tokenizer.unk_token
    byte_fallback = spec["model"]["byte_fallback"]
    for token, number in tokenizer.get_vocab().items():
        if number >= size:
            if number in added:
                continue  # An extra token that the model has no row for: never met.
            raise UserError(
                f"the tokenizer has a token {token!r} of id {number}, the model's "
                f"vocabulary ends at {size}; name the model's own tokenizer"
            )
        kind = NORMAL
        if token == unknown and byte_fallback:
            kind = UNKNOWN
        elif number in added:
            kind = CONTROL if added[number]["special"] else USER_DEFINED
        elif byte_fallback and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            kind = BYTE
        tokens[number], types[number] = token, kind
    return tokens, types


def _name_rule(backend: Any, spec: Mapping[str, Any]) -> str:
    """The name of the rule that cuts text into words as the tokenizer does."""
    normalizer = spec["normalizer"] and spec["normalizer"]["type"]
    whole_words = spec["model"].get("ignore_merges", False)
    if backend.pre_tokenizer is not None and normalizer in (None, "NFC"):
        words = [backend.pre_tokenizer.pre_tokenize_str(text) for text in PROBES]
        for name, rule in WORD_RULES.items():
            cutter = word_cutter(rule)
            same = rule.whole_words == whole_words and rule.nfc == bool(normalizer)
            if same and words == [cutter.pre_tokenize_str(text) for text in PROBES]:
                return name
    raise UserError(
        f"the tokenizer cuts text into words by a rule that has no known name in GGUF; "
        f"the rules that have one: {', '.join(WORD_RULES)}"
    )


def _sentencepiece(
    backend: Any,
    tokens: list[str],
    types: list[int],
    merges: Sequence[tuple[str, ...]],
) -> dict[str, Any]:
    scores = _scores(tokens, merges)
    if set(derive_merges(tokens, scores, types)) != set(merges):
        raise UserError(
            "the tokenizer's merges are not SentencePiece's, whose scores are all that "
            "GGUF keeps of them; write a Hugging Face directory instead"
        )
    start = "a"
    if backend.normalizer is not None:
        start = backend.normalizer.normalize_str(start)
    if backend.pre_tokenizer is not None:
        start = backend.pre_tokenizer.pre_tokenize_str(start)[0][0]
    return {
        "model": "llama",
        "pre": "default",
        # Spaces of user-defined tokens, which are found before spaces are replaced.
        "tokens": [
            " " * len(token)
            if kind == USER_DEFINED and set(token) == {SPACE}
            else token
            for token, kind in zip(tokens, types, strict=True)
        ],
        "scores": scores,
        "token_type": types,
        "add_space_prefix": start.startswith(SPACE),
    }


def _scores(tokens: list[str], merges: Sequence[tuple[str, ...]]) -> list[float]:
    """Scores that give the merges back: one step down for each next joined token.

    Tokens whose merges stand between one another's had one score. What no merge makes,
    a single character, needs none and gets the lowest.
    """
    ends = {"".join(pair): place for place, pair in enumerate(merges)}
    found: dict[str, float] = {}
    level, reach = 0, -1
    for place, pair in enumerate(merges):
        if place > reach:
            level += 1
        token = "".join(pair)
        found[token] = float(1 - level)
        reach = max(reach, ends[token])
    return [found.get(token, -float(level)) for token in tokens]


def _special_ids(
    tokenizer: Any,
    config: "PretrainedConfig",
    generation_config: Mapping[str, Any] | None,
) -> dict[str, int]:
    found: dict[str, int] = {}
    for short, name in SPECIAL.items():
        number = getattr(tokenizer, f"{short}_token_id", None)
        if number is None:
            number = _listed(getattr(config, f"{short}_token_id", None))[:1]
            number = number[0] if number else None
        if number is not None and 0 <= number < config.vocab_size:
            found[name] = number
    ends = _listed((generation_config or {}).get("eos_token_id"))
    ends += _listed(config.eos_token_id)
    others = [one for one in dict.fromkeys(ends) if one != found.get("eos")]
    # Of the tokens that end an answer there is room for two more.
    found.update(zip(("eot", "eom"), others, strict=False))
    return found


def _listed(value: int | Sequence[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)


def _added_ends(tokenizer: Any, ids: Mapping[str, int]) -> dict[str, bool]:
    """Whether a sequence gets a BOS and an EOS, seen from one."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    start = [ids["bos"]] if "bos" in ids else []
    end = [ids["eos"]] if "eos" in ids else []
    return {
        "add_bos_token": bool(start) and whole[: len(bare) + 1] == start + bare,
        "add_eos_token": bool(end) and whole[-len(bare) - 1 :] == bare + end,
    }


def _chat_template(template: str | Mapping[str, str] | None) -> dict[str, Any]:
    key = "tokenizer.chat_template"
    if not template:
        return {}
    if isinstance(template, str):
        return {key: template}
    named = {name: text for name, text in template.items() if name != "default"}
    keys: dict[str, Any] = {f"{key}.{name}": text for name, text in named.items()}
    if named:
        keys["tokenizer.chat_templates"] = list(named)
    return keys | ({key: template["default"]} if "default" in template else {})

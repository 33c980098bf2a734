"""Builds a transformers config from a GGUF file's metadata.

What the maths depends on is taken from the file or is an error; a key that is not
understood is an error too, because it may change the maths.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from fjft.checkpoint.gguf import GgufSource
from fjft.checkpoint.gguf_header import require
from fjft.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Keys below `<architecture>.` that are read here.
READ_KEYS = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}
# Keys that change nothing: how the file came about.
IDLE_KEYS = {"rope.scaling.finetuned", "tensor_data_layout"}
# Keys that change nothing when they are zero.
ZERO_KEYS = {"expert_count", "expert_used_count"}

# The pieces of Llama 3.1's frequency rule; every release so far has these three, and
# the file's own factors are compared with what they give.
LLAMA3_RULE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def build_config(source: GgufSource) -> tuple["PretrainedConfig", dict[str, Any]]:
    """Builds the config that the original model's config.json would give.

    Returns:
      The config, and the content of a generation_config.json: the ids of the tokens
      that begin, end and pad.

    Raises:
      UserError: A key is missing, unknown, or has a value that cannot be expressed.
    """
    from transformers import AutoConfig

    _check_keys(source)
    values = _common(source) | CONFIGS[source.architecture](source)
    config = AutoConfig.for_model(**values)
    return config, _generation_config(source)


def _check_keys(source: GgufSource) -> None:
    prefix = f"{source.architecture}."
    for key, value in source.metadata.items():
        short = key.removeprefix(prefix)
        idle = short in READ_KEYS | IDLE_KEYS or (short in ZERO_KEYS and value == 0)
        if key.startswith(prefix) and not idle:
            raise UserError(
                f"{source.path} says {key} = {value!r}, which is not understood and "
                f"may change the model's results; this variant is not read"
            )


def _require(source: GgufSource, key: str) -> Any:
    return require(source.path, source.metadata, f"{source.architecture}.{key}")


def _optional(source: GgufSource, key: str) -> Any:
    full = f"{source.architecture}.{key}"
    return _require(source, key) if full in source.metadata else None


def _common(source: GgufSource) -> dict[str, Any]:
    heads = _require(source, "attention.head_count")
    kv_heads = _optional(source, "attention.head_count_kv")
    ids = _token_ids(source)
    return {
        "vocab_size": source.shape("model.embed_tokens.weight")[0],
        "hidden_size": _require(source, "embedding_length"),
        "intermediate_size": _require(source, "feed_forward_length"),
        "num_hidden_layers": _require(source, "block_count"),
        "num_attention_heads": heads,
        # By the format, absent means one key and value head per query head.
        "num_key_value_heads": heads if kv_heads is None else kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": _require(source, "context_length"),
        "rms_norm_eps": _require(source, "attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(source),
        "tie_word_embeddings": "lm_head.weight" not in source.names,
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "pad_token_id": ids["pad"],
    }


def _head_dim(source: GgufSource) -> int:
    """The size of a head; rotary dimensions must cover it whole."""
    heads = _require(source, "attention.head_count")
    rotary = _optional(source, "rope.dimension_count")
    size = _optional(source, "attention.key_length")
    if size is None:
        # By the format, the heads then share the embedding's width.
        size = _require(source, "embedding_length") // heads
        size = size if rotary is None else rotary
    others = [rotary, _optional(source, "attention.value_length")]
    if any(other not in (None, size) for other in others):
        raise UserError(
            f"{source.path} has heads of size {size}, {others[0]} rotary dimensions "
            f"and values of size {others[1]}; only equal sizes are read"
        )
    return size


def _llama(source: GgufSource) -> dict[str, Any]:
    # The layout is shared by Llama and Mistral; only the window tells them apart.
    window = _optional(source, "attention.sliding_window")
    q_bias, o_bias, mlp_bias = (
        f"model.layers.0.{part}_proj.bias" in source.names
        for part in ("self_attn.q", "self_attn.o", "mlp.gate")
    )
    if q_bias != o_bias or (window is not None and (q_bias or mlp_bias)):
        raise UserError(
            f"{source.path} has biases on some projections only (q {q_bias}, "
            f"o {o_bias}, mlp {mlp_bias}), which no Llama or Mistral config can say"
        )
    head_dim = _head_dim(source)
    if window is not None:
        return {
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "head_dim": head_dim,
            "sliding_window": window,
        }
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "head_dim": head_dim,
        "attention_bias": q_bias,
        "mlp_bias": mlp_bias,
    }


def _qwen2(source: GgufSource) -> dict[str, Any]:
    heads, width = _require(source, "attention.head_count"), _head_dim(source)
    if heads * width != _require(source, "embedding_length"):
        raise UserError(
            f"{source.path} has {heads} heads of size {width}, which do not add up to "
            f"its embedding; no Qwen2 config can say that"
        )
    return {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        **_no_window(source),
    }


def _qwen3(source: GgufSource) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": _head_dim(source),
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in source.names,
        **_no_window(source),
    }


def _no_window(source: GgufSource) -> dict[str, Any]:
    window = _optional(source, "attention.sliding_window")
    if window is not None:
        raise UserError(
            f"{source.path} has a sliding window of {window} but does not say for "
            f"which layers; this variant is not read"
        )
    return {
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": _require(source, "block_count"),
    }


CONFIGS: dict[str, Callable[[GgufSource], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}


def _rope(source: GgufSource) -> dict[str, Any]:
    theta = _require(source, "rope.freq_base")
    kind = _optional(source, "rope.scaling.type")
    if source.rope_factors is not None and kind in (None, "none"):
        return _llama3_rope(source, theta, source.rope_factors)
    if kind in (None, "none"):
        return {"rope_type": "default", "rope_theta": theta}
    if kind not in ("linear", "yarn") or source.rope_factors is not None:
        raise UserError(
            f"{source.path} has RoPE scaling {kind!r}; from GGUF these are read: none, "
            f"linear, yarn, llama3"
        )
    rope = {
        "rope_type": kind,
        "rope_theta": theta,
        "factor": _require(source, "rope.scaling.factor"),
    }
    if kind == "yarn":
        rope["original_max_position_embeddings"] = _require(
            source, "rope.scaling.original_context_length"
        )
        for name in ("beta_fast", "beta_slow"):
            beta = _optional(source, f"rope.scaling.yarn_{name}")
            if beta is not None:
                rope[name] = beta
    return rope


def _llama3_rope(
    source: GgufSource, theta: float, factors: np.ndarray
) -> dict[str, Any]:
    """Recovers Llama 3.1's rule from the divisors that llama.cpp keeps instead.

    A frequency of wavelength w keeps its value where w is short, is divided by
    `factor` where w is long, and is blended in between.
    """
    factor = float(str(factors.max()))
    rule = {"rope_type": "llama3", "rope_theta": theta, "factor": factor} | LLAMA3_RULE
    half = _head_dim(source) // 2
    waves = 2 * np.pi * theta ** (np.arange(half) / half)
    turns = LLAMA3_RULE["original_max_position_embeddings"] / waves
    low, high = LLAMA3_RULE["low_freq_factor"], LLAMA3_RULE["high_freq_factor"]
    blend = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - blend) / factor + blend)
    if factors.shape != (half,) or not np.allclose(factors, expected, rtol=1e-4):
        raise UserError(
            f"{source.path} scales its rotary frequencies by factors that are not "
            f"Llama 3's rule with {LLAMA3_RULE}; this variant is not read"
        )
    return rule


def _token_ids(source: GgufSource) -> dict[str, int | None]:
    names = {"bos": "bos", "eos": "eos", "eot": "eot", "pad": "padding"}
    return {
        short: source.metadata.get(f"tokenizer.ggml.{long}_token_id")
        for short, long in names.items()
    }


def _generation_config(source: GgufSource) -> dict[str, Any]:
    ids = _token_ids(source)
    ends = [one for one in dict.fromkeys([ids["eos"], ids["eot"]]) if one is not None]
    content = {
        "bos_token_id": ids["bos"],
        "eos_token_id": ends if len(ends) > 1 else ids["eos"],
        "pad_token_id": ids["pad"],
    }
    return {key: value for key, value in content.items() if value is not None}

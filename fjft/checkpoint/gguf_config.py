"""Builds a transformers config from a GGUF file's metadata.

What the maths depends on is taken from the file or is an error; a key that is not
understood is an error too, because it may change the maths.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fjft.checkpoint.gguf import GgufSource
from fjft.checkpoint.gguf_rope import read_rope
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
GEMMA2_KEYS = {
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "attention.sliding_window_pattern",
}
MORE_KEYS = {
    "gemma2": GEMMA2_KEYS,
    "gemma3": GEMMA2_KEYS - {"attn_logit_softcapping"} | {"rope.freq_base_swa"},
}
# Keys that change nothing: how the file came about.
IDLE_KEYS = {"rope.scaling.finetuned", "tensor_data_layout"}
# Keys that change nothing when they are zero.
ZERO_KEYS = {"expert_count", "expert_used_count"}

# What the format says of Gemma files that lack the key; llama.cpp's own lack some.
GEMMA_THETA = 10_000.0
GEMMA2_SOFTCAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
# Every how many layers one has no window.
GEMMA_PERIODS = {"gemma2": 2, "gemma3": 6}
# The models (the 27B ones) whose scale of scores comes from the width, by their depth;
# the others' comes from the size of a head. No key tells.
WIDTH_SCALED = {"gemma2": 46, "gemma3": 62}


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
    known = READ_KEYS | IDLE_KEYS | MORE_KEYS.get(source.architecture, set())
    for key, value in source.metadata.items():
        short = key.removeprefix(prefix)
        idle = short in known or (short in ZERO_KEYS and value == 0)
        if key.startswith(prefix) and not idle:
            raise UserError(
                f"{source.path} says {key} = {value!r}, which is not understood and "
                f"may change the model's results; this variant is not read"
            )


def _common(source: GgufSource) -> dict[str, Any]:
    heads = source.require("attention.head_count")
    kv_heads = source.optional("attention.head_count_kv")
    ids = _token_ids(source)
    return {
        "vocab_size": source.shape("model.embed_tokens.weight")[0],
        "hidden_size": source.require("embedding_length"),
        "intermediate_size": source.require("feed_forward_length"),
        "num_hidden_layers": source.require("block_count"),
        "num_attention_heads": heads,
        # By the format, absent means one key and value head per query head.
        "num_key_value_heads": heads if kv_heads is None else kv_heads,
        "max_position_embeddings": source.require("context_length"),
        "rms_norm_eps": source.require("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "lm_head.weight" not in source.names,
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "pad_token_id": ids["pad"],
    }


def _head_dim(source: GgufSource) -> int:
    """The size of a head; rotary dimensions must cover it whole."""
    heads = source.require("attention.head_count")
    rotary = source.optional("rope.dimension_count")
    size = source.optional("attention.key_length")
    if size is None:
        # By the format, the heads then share the embedding's width.
        size = source.require("embedding_length") // heads
        size = size if rotary is None else rotary
    others = [rotary, source.optional("attention.value_length")]
    if any(other not in (None, size) for other in others):
        raise UserError(
            f"{source.path} has heads of size {size}, {others[0]} rotary dimensions "
            f"and values of size {others[1]}; only equal sizes are read"
        )
    return size


def _has_bias(source: GgufSource, part: str) -> bool:
    return f"model.layers.0.{part}_proj.bias" in source.names


def _llama(source: GgufSource) -> dict[str, Any]:
    # The layout is shared by Llama and Mistral; only the window tells them apart.
    window = source.optional("attention.sliding_window")
    q_bias, o_bias, mlp_bias = (
        _has_bias(source, part) for part in ("self_attn.q", "self_attn.o", "mlp.gate")
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
            **_llama_form(source),
        }
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "head_dim": head_dim,
        "attention_bias": q_bias,
        "mlp_bias": mlp_bias,
        **_llama_form(source),
    }


def _llama_form(source: GgufSource) -> dict[str, Any]:
    rope = read_rope(source, _head_dim(source))
    return {"hidden_act": "silu", "rope_parameters": rope}


def _qwen2(source: GgufSource) -> dict[str, Any]:
    heads, width = source.require("attention.head_count"), _head_dim(source)
    if heads * width != source.require("embedding_length"):
        raise UserError(
            f"{source.path} has {heads} heads of size {width}, which do not add up to "
            f"its embedding; no Qwen2 config can say that"
        )
    return {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        **_llama_form(source),
        **_no_window(source),
    }


def _qwen3(source: GgufSource) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": _head_dim(source),
        "attention_bias": _has_bias(source, "self_attn.q"),
        **_llama_form(source),
        **_no_window(source),
    }


def _no_window(source: GgufSource) -> dict[str, Any]:
    window = source.optional("attention.sliding_window")
    if window is not None:
        raise UserError(
            f"{source.path} has a sliding window of {window} but does not say for "
            f"which layers; this variant is not read"
        )
    return {
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": source.require("block_count"),
    }


def _gemma(source: GgufSource) -> dict[str, Any]:
    head_dim = _head_dim(source)
    return {
        "model_type": "gemma",
        "architectures": ["GemmaForCausalLM"],
        "head_dim": head_dim,
        "attention_bias": _has_bias(source, "self_attn.q"),
        "hidden_act": "gelu_pytorch_tanh",
        "rope_parameters": read_rope(source, head_dim, GEMMA_THETA),
    }


def _gemma2(source: GgufSource) -> dict[str, Any]:
    values = _gemma(source) | _gemma_windows(source)
    for key, cap in GEMMA2_SOFTCAPS.items():
        given = source.optional(key)
        values[key] = cap if given is None else given
    return {
        "hidden_activation": values.pop("hidden_act"),
        **values,
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
    }


def _gemma3(source: GgufSource) -> dict[str, Any]:
    values = _gemma(source) | _gemma_windows(source)
    local = source.optional("rope.freq_base_swa")
    return {
        "hidden_activation": values.pop("hidden_act"),
        **values,
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "final_logit_softcapping": source.optional("final_logit_softcapping"),
        # A scaling of rotary frequencies is for the layers without a window only.
        "rope_parameters": {
            "full_attention": values["rope_parameters"],
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": GEMMA_THETA if local is None else local,
            },
        },
    }


def _gemma_windows(source: GgufSource) -> dict[str, Any]:
    """The window, the layers it is for, and the scale of the scores in them."""
    name, layers = source.architecture, source.require("block_count")
    key = f"{name}.attention.sliding_window_pattern"
    period = source.metadata.get(key, GEMMA_PERIODS[name])
    if isinstance(period, list):
        windowed = [bool(one) for one in period]
    else:
        # By the format, 0 puts a window on every layer.
        windowed = [not period or (n + 1) % period != 0 for n in range(layers)]
    scalar = _head_dim(source)
    if layers == WIDTH_SCALED[name]:
        scalar = source.require("embedding_length")
        scalar //= source.require("attention.head_count")
    return {
        "sliding_window": source.require("attention.sliding_window"),
        "layer_types": [
            "sliding_attention" if here else "full_attention" for here in windowed
        ],
        "query_pre_attn_scalar": scalar,
    }


CONFIGS: dict[str, Callable[[GgufSource], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
}


def _token_ids(source: GgufSource) -> dict[str, int | None]:
    names = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "pad": "padding"}
    return {
        short: source.metadata.get(f"tokenizer.ggml.{long}_token_id")
        for short, long in names.items()
    }


def _generation_config(source: GgufSource) -> dict[str, Any]:
    ids = _token_ids(source)
    ends = list(dict.fromkeys(ids[end] for end in ("eos", "eot", "eom")))
    ends = [one for one in ends if one is not None]
    content = {
        "bos_token_id": ids["bos"],
        "eos_token_id": ends if len(ends) > 1 else ids["eos"],
        "pad_token_id": ids["pad"],
    }
    return {key: value for key, value in content.items() if value is not None}

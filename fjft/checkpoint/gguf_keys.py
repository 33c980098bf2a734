"""Says a transformers config in GGUF's keys: the reverse of `gguf_config`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fjft.checkpoint.gguf_config import GEMMA_PERIODS
from fjft.checkpoint.gguf_rope import rope_keys
from fjft.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Hugging Face's model_type -> GGUF's architecture.
ARCHITECTURE_OF = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}


def choose_architecture(config: "PretrainedConfig") -> str:
    """GGUF's architecture for a config.

    Raises:
      UserError: There is none that is written.
    """
    found = ARCHITECTURE_OF.get(config.model_type)
    if found is None:
        raise UserError(
            f"model type {config.model_type!r} is not written as GGUF; these are: "
            f"{', '.join(ARCHITECTURE_OF)}"
        )
    return found


def config_keys(config: "PretrainedConfig") -> dict[str, Any]:
    """The metadata that says what a config says.

    What has no key (an activation) is left out: whether the keys say all that matters
    shows when they are read back.

    Raises:
      UserError: The model's type or its RoPE has no words in the format.
    """
    architecture = choose_architecture(config)
    fields = config.to_dict()
    heads = fields["num_attention_heads"]
    # Not every family's config has the field.
    head_dim = fields.get("head_dim") or fields["hidden_size"] // heads
    rope = fields["rope_parameters"]
    keys = {
        "block_count": fields["num_hidden_layers"],
        "context_length": fields["max_position_embeddings"],
        "embedding_length": fields["hidden_size"],
        "feed_forward_length": fields["intermediate_size"],
        "vocab_size": fields["vocab_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": fields["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(fields["rms_norm_eps"]),
        "rope.dimension_count": head_dim,
    }
    if architecture == "gemma3":
        keys["rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    keys |= rope_keys(rope)
    if config.model_type in ("mistral", "gemma2", "gemma3_text"):
        keys["attention.sliding_window"] = fields["sliding_window"]
    if architecture in GEMMA_PERIODS:
        keys |= _pattern(architecture, fields["layer_types"])
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            keys[name] = fields[name]
    if architecture == "gemma3":
        del keys["attn_logit_softcapping"]  # which its attention does not use
    return {
        f"{architecture}.{key}": value
        for key, value in keys.items()
        if value is not None
    }


def _pattern(architecture: str, layer_types: Sequence[str]) -> dict[str, int]:
    """Every how many layers one has no window, where that is not the usual number."""
    full = [n for n, kind in enumerate(layer_types, 1) if kind == "full_attention"]
    usual = GEMMA_PERIODS[architecture]
    period = full[0] if full else len(layer_types) + 1
    if full == list(range(usual, len(layer_types) + 1, usual)):
        return {}
    if full == list(range(period, len(layer_types) + 1, period)):
        return {"attention.sliding_window_pattern": period}
    raise UserError(
        f"GGUF says the layers without a window as every n-th one; this model has "
        f"none on layers {full} of {len(layer_types)}"
    )

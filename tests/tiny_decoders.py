"""Tiny configs of the decoder families beyond Llama, Mistral and Qwen."""

from typing import Any

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 3e-3,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta} | more


def _yarn(theta: float, **more: Any) -> dict[str, Any]:
    context = {"factor": 4.0, "original_max_position_embeddings": 16}
    return {"rope_type": "yarn", "rope_theta": theta} | context | more


def _gemma(**more: Any) -> dict[str, Any]:
    return SHAPE | {"head_dim": 10, "tie_word_embeddings": True} | more


def _without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in names}


NEOX = _without(SHAPE, "num_key_value_heads", "rms_norm_eps") | {"layer_norm_eps": 2e-3}
GPT2: dict[str, Any] = {
    "vocab_size": 64,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 6,
    "n_positions": 64,
    "layer_norm_epsilon": 2e-3,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}

# As `tiny.CONFIGS`.
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "gpt2": {
        "scaled-by-layer": GPT2
        | {
            "n_inner": 80,
            "scale_attn_by_inverse_layer_idx": True,
            "activation_function": "gelu",
        },
        "unscaled-untied": GPT2
        | {"scale_attn_weights": False, "tie_word_embeddings": False},
    },
    "gpt_neox": {
        "parallel": NEOX | {"rope_parameters": _rope(7e2, partial_rotary_factor=0.5)},
        "in-turn-tied": NEOX
        | {
            "use_parallel_residual": False,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "hidden_act": "gelu_new",
            "rope_parameters": {
                "rope_type": "linear",
                "rope_theta": 3e3,
                "factor": 2.0,
                "partial_rotary_factor": 0.25,
            },
        },
    },
    "gemma": {
        "biases": _gemma(attention_bias=True, rope_parameters=_rope(7e2)),
        "untied": _gemma(tie_word_embeddings=False, rope_parameters=_rope(4e3)),
    },
    "gemma2": {
        "tight-caps": _gemma(
            num_hidden_layers=5,
            query_pre_attn_scalar=23,
            attn_logit_softcapping=4.0,
            final_logit_softcapping=5.0,
            sliding_window=6,
            rope_parameters=_rope(7e2),
        ),
        "no-caps": _gemma(
            query_pre_attn_scalar=29,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            attention_bias=True,
            sliding_window=40,
            layer_types=["full_attention", "sliding_attention", "sliding_attention"],
            rope_parameters=_rope(4e3),
        ),
    },
    "gemma3_text": {
        "two-bases": _gemma(
            num_hidden_layers=7,
            query_pre_attn_scalar=23,
            sliding_window=5,
            final_logit_softcapping=9.0,
            rope_parameters={
                "sliding_attention": _rope(3e2),
                "full_attention": {
                    "rope_type": "linear",
                    "rope_theta": 5e4,
                    "factor": 8.0,
                },
            },
        ),
        "every-second": _gemma(
            num_hidden_layers=4,
            query_pre_attn_scalar=9,
            attention_bias=True,
            sliding_window=9,
            layer_types=["sliding_attention", "full_attention"] * 2,
            rope_parameters={
                "sliding_attention": _rope(2e2),
                "full_attention": _rope(9e3),
            },
        ),
    },
    "phi3": {
        "short-longrope": SHAPE
        | {
            "original_max_position_embeddings": 64,
            "max_position_embeddings": 256,
            "sliding_window": 11,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 8e2,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.1, 1.3, 2.0],
                "long_factor": [1.5, 3.0, 7.0],
            },
        },
        "plain-tied": SHAPE
        | {
            "tie_word_embeddings": True,
            "num_key_value_heads": 6,
            "rope_parameters": _rope(4e3, partial_rotary_factor=0.5),
        },
    },
    "olmo2": {
        "grouped": SHAPE | {"rope_parameters": _rope(7e2)},
        "yarn-biases-tied": SHAPE
        | {
            "num_key_value_heads": 6,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": _yarn(3e3, beta_fast=20.0, beta_slow=0.5),
        },
    },
    "smollm3": {
        "every-third": SHAPE
        | {
            "num_hidden_layers": 7,
            "no_rope_layer_interval": 3,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": _rope(7e2),
        },
        "windows-yarn": SHAPE
        | {
            "num_hidden_layers": 5,
            "no_rope_layers": [1, 0, 1, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 6,
            "tie_word_embeddings": False,
            "rope_parameters": _yarn(2e3, truncate=False, attention_factor=1.3),
        },
    },
    "mixtral": {
        "windowed": SHAPE
        | {
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "sliding_window": 7,
            "rope_parameters": _rope(7e2),
        },
        "one-expert-tied": SHAPE
        | {
            "head_dim": 12,
            "num_local_experts": 3,
            "num_experts_per_tok": 1,
            "tie_word_embeddings": True,
            "rope_parameters": _yarn(4e3, mscale=0.7, mscale_all_dim=0.4),
        },
    },
    "qwen2_moe": {
        "some-dense-layers": SHAPE
        | EXPERTS
        | {
            "num_hidden_layers": 5,
            "mlp_only_layers": [1],
            "shared_expert_intermediate_size": 32,
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 4,
            "rope_parameters": _rope(7e2),
        },
        "no-biases": SHAPE
        | EXPERTS
        | {
            "qkv_bias": False,
            "shared_expert_intermediate_size": 40,
            "rope_parameters": _rope(4e3),
        },
    },
    "qwen3_moe": {
        "every-second-normed": SHAPE
        | EXPERTS
        | {
            "num_hidden_layers": 5,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            "attention_bias": True,
            "head_dim": 10,
            "rope_parameters": _rope(7e2),
        },
        "windowed-tied": SHAPE
        | EXPERTS
        | {
            "num_experts_per_tok": 3,
            "use_sliding_window": True,
            "sliding_window": 6,
            "tie_word_embeddings": True,
            "rope_parameters": _rope(4e3),
        },
    },
}

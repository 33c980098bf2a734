"""Qwen2-MoE (a shared expert beside the routed ones) and Qwen3-MoE.

Source: `transformers/models/qwen2_moe` and `transformers/models/qwen3_moe`.
"""

from typing import Any

from fjft.models import rope
from fjft.models.block import Architecture, Kind
from fjft.models.decoder import Decoder
from fjft.models.fields import Fields
from fjft.models.moe import Experts
from fjft.models.names import (
    LLAMA_ATTENTION,
    LLAMA_MLP,
    PRE_NORMS,
    QK_NORMS,
    Names,
    make_rows,
    shared_numbers,
    take_activation,
    take_balance,
    take_windows,
)
from fjft.models.weights import Row

MODEL = Decoder
SPARSE_MLP = {
    "moe.router": "mlp.gate",
    "moe.experts.gate": "mlp.experts.{}.gate_proj",
    "moe.experts.up": "mlp.experts.{}.up_proj",
    "moe.experts.down": "mlp.experts.{}.down_proj",
}
SHARED_EXPERT = {
    "moe.shared.gate": "mlp.shared_expert.gate_proj",
    "moe.shared.up": "mlp.shared_expert.up_proj",
    "moe.shared.down": "mlp.shared_expert.down_proj",
    "moe.shared_gate": "mlp.shared_expert_gate",
}
NAMES = Names(
    parts=PRE_NORMS
    | LLAMA_ATTENTION
    | QK_NORMS
    | LLAMA_MLP
    | SPARSE_MLP
    | SHARED_EXPERT
)


def architecture(fields: Fields) -> Architecture:
    """Reads the config of a `qwen2_moe` or `qwen3_moe` checkpoint."""
    numbers = shared_numbers(fields)
    # Neither config class declares it, but the attention asks for it.
    head_dim = fields.undeclared(
        "head_dim", numbers["hidden_size"] // numbers["num_heads"]
    )
    positions = rope.from_config(
        fields.take("rope_parameters"), head_dim, fields.take("max_position_embeddings")
    )
    qwen3 = fields.model_type == "qwen3_moe"
    special = _qwen3(fields) if qwen3 else _qwen2(fields)
    windows, shared_size = special.pop("windows"), special.pop("shared_size")
    step, dense = fields.take("decoder_sparse_step"), fields.take("mlp_only_layers")
    experts = Experts(
        count=fields.take("num_local_experts" if qwen3 else "num_experts"),
        per_token=fields.take("num_experts_per_tok"),
        intermediate_size=fields.take("moe_intermediate_size"),
        shared_size=shared_size,
        normalize=fields.take("norm_topk_prob"),
        balance_coefficient=take_balance(fields),
    )
    return Architecture(
        **numbers,
        **special,
        head_dim=head_dim,
        kinds=tuple(
            Kind(window, positions, n not in dense and n % step == step - 1)
            for n, window in enumerate(windows)
        ),
        activation=take_activation(fields),
        mlp_bias=False,
        attention_scale=head_dim**-0.5,
        experts=experts,
    )


def _qwen2(fields: Fields) -> dict[str, Any]:
    # transformers works `layer_types` out of these two.
    fields.ignore("use_sliding_window", "max_window_layers")
    return {
        "windows": take_windows(fields, fields.take("sliding_window")),
        "shared_size": fields.take("shared_expert_intermediate_size"),
        "qkv_bias": fields.take("qkv_bias"),
        "o_bias": False,
    }


def _qwen3(fields: Fields) -> dict[str, Any]:
    bias = fields.take("attention_bias")
    fields.ignore("use_sliding_window")  # without it transformers drops the window
    return {
        "windows": [fields.take("sliding_window")] * fields.take("num_hidden_layers"),
        "shared_size": None,
        "qkv_bias": bias,
        "o_bias": bias,
        "qk_norm": "head",
    }


def rows(arch: Architecture) -> tuple[Row, ...]:
    """Hugging Face's names."""
    return make_rows(arch, NAMES)

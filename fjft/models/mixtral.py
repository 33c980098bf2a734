"""Mixtral: Mistral with routed experts in every layer.

Source: `transformers/models/mixtral`.
"""

from fjft.models import rope
from fjft.models.block import Architecture, Kind
from fjft.models.decoder import Decoder
from fjft.models.fields import Fields
from fjft.models.moe import Experts
from fjft.models.names import (
    LLAMA_ATTENTION,
    PRE_NORMS,
    Names,
    make_rows,
    shared_numbers,
    take_activation,
    take_balance,
)
from fjft.models.weights import Row

MODEL = Decoder
NAMES = Names(
    parts=PRE_NORMS
    | LLAMA_ATTENTION
    | {
        "moe.router": "block_sparse_moe.gate",
        "moe.experts.gate": "block_sparse_moe.experts.{}.w1",
        "moe.experts.up": "block_sparse_moe.experts.{}.w3",
        "moe.experts.down": "block_sparse_moe.experts.{}.w2",
    }
)


def architecture(fields: Fields) -> Architecture:
    """Reads the config of a `mixtral` checkpoint."""
    numbers = shared_numbers(fields)
    head_dim = fields.take("head_dim")
    if head_dim is None:
        head_dim = numbers["hidden_size"] // numbers["num_heads"]
    positions = rope.from_config(
        fields.take("rope_parameters"), head_dim, fields.take("max_position_embeddings")
    )
    fields.expect("router_jitter_noise", 0.0)
    experts = Experts(
        count=fields.take("num_local_experts"),
        per_token=fields.take("num_experts_per_tok"),
        intermediate_size=numbers["intermediate_size"],
        shared_size=None,
        normalize=True,
        balance_coefficient=take_balance(fields),
    )
    kind = Kind(fields.take("sliding_window"), positions, is_sparse=True)
    return Architecture(
        **numbers,
        head_dim=head_dim,
        kinds=(kind,) * fields.take("num_hidden_layers"),
        activation=take_activation(fields),
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        attention_scale=head_dim**-0.5,
        experts=experts,
    )


def rows(arch: Architecture) -> tuple[Row, ...]:
    """Hugging Face's names."""
    return make_rows(arch, NAMES)

"""Phi-3, Phi-3.5 and Phi-4: fused maps, longrope, rotation of a part of each head.

Source: `transformers/models/phi3`.
"""

from fjft.models import rope
from fjft.models.block import Architecture, Kind
from fjft.models.decoder import Decoder
from fjft.models.fields import Fields
from fjft.models.names import (
    PRE_NORMS,
    Names,
    make_rows,
    shared_numbers,
    take_activation,
)
from fjft.models.weights import Row

MODEL = Decoder
NAMES = Names(
    parts=PRE_NORMS
    | {
        "attention.qkv": "self_attn.qkv_proj",
        "attention.o": "self_attn.o_proj",
        "mlp.gate_up": "mlp.gate_up_proj",
        "mlp.down": "mlp.down_proj",
    }
)


def architecture(fields: Fields) -> Architecture:
    """Reads the config of a `phi3` checkpoint."""
    numbers = shared_numbers(fields)
    # The config class does not declare it, but the attention asks for it.
    head_dim = fields.undeclared(
        "head_dim", numbers["hidden_size"] // numbers["num_heads"]
    )
    # transformers copies it into the rope parameters where they need it.
    fields.ignore("original_max_position_embeddings")
    positions = rope.from_config(
        fields.take("rope_parameters"),
        head_dim,
        fields.take("max_position_embeddings"),
        partial=True,
    )
    fields.ignore("embd_pdrop")  # a field that the model does not use
    kind = Kind(fields.take("sliding_window"), positions)
    return Architecture(
        **numbers,
        head_dim=head_dim,
        kinds=(kind,) * fields.take("num_hidden_layers"),
        activation=take_activation(fields),
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        attention_scale=head_dim**-0.5,
        qkv="fused",
        mlp="gated_fused",
        residual_dropout=fields.take("resid_pdrop"),
    )


def rows(arch: Architecture) -> tuple[Row, ...]:
    """Hugging Face's names."""
    return make_rows(arch, NAMES)

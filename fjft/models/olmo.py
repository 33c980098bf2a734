"""OLMo 2: norms after attention and MLP instead of before, and on all of q and k.

Source: `transformers/models/olmo2`.
"""

from fjft.models import rope
from fjft.models.block import Architecture, Kind
from fjft.models.decoder import Decoder
from fjft.models.fields import Fields
from fjft.models.names import (
    LLAMA_ATTENTION,
    LLAMA_MLP,
    QK_NORMS,
    Names,
    make_rows,
    shared_numbers,
    take_activation,
)
from fjft.models.weights import Row

MODEL = Decoder
NAMES = Names(
    parts={
        "attention_post_norm": "post_attention_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    }
    | LLAMA_ATTENTION
    | QK_NORMS
    | LLAMA_MLP
)


def architecture(fields: Fields) -> Architecture:
    """Reads the config of an `olmo2` checkpoint."""
    numbers = shared_numbers(fields)
    # The config class does not declare it, but the attention asks for it.
    head_dim = fields.undeclared(
        "head_dim", numbers["hidden_size"] // numbers["num_heads"]
    )
    bias = fields.take("attention_bias")
    positions = rope.from_config(
        fields.take("rope_parameters"), head_dim, fields.take("max_position_embeddings")
    )
    return Architecture(
        **numbers,
        head_dim=head_dim,
        kinds=(Kind(None, positions),) * fields.take("num_hidden_layers"),
        activation=take_activation(fields),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=False,
        attention_scale=head_dim**-0.5,
        norm="rms_wide",
        pre_norm=False,
        post_norm=True,
        qk_norm="width",
    )


def rows(arch: Architecture) -> tuple[Row, ...]:
    """Hugging Face's names."""
    return make_rows(arch, NAMES)

"""Llama 2, 3, 3.1, 3.2 and SmolLM2, and Mistral with its sliding window.

Source: `transformers/models/llama` and `transformers/models/mistral`.
"""

from fjft.models import heads, rope
from fjft.models.block import Architecture, Kind
from fjft.models.classifier import Classifier
from fjft.models.decoder import Decoder
from fjft.models.fields import Fields
from fjft.models.names import (
    LLAMA_ATTENTION,
    LLAMA_MLP,
    PRE_NORMS,
    Names,
    make_rows,
    shared_numbers,
    take_activation,
    take_labels,
)
from fjft.models.weights import Row

MODEL = Decoder
CLASSIFIER = Classifier
HEADS = heads.DECODER_HEADS
NAMES = Names(parts=PRE_NORMS | LLAMA_ATTENTION | LLAMA_MLP)


def architecture(fields: Fields) -> Architecture:
    """Reads the config of a `llama` or `mistral` checkpoint."""
    mistral = fields.model_type == "mistral"
    window = fields.take("sliding_window") if mistral else None
    bias = False if mistral else fields.take("attention_bias")
    head_dim = fields.take("head_dim")
    positions = rope.from_config(
        fields.take("rope_parameters"), head_dim, fields.take("max_position_embeddings")
    )
    return Architecture(
        **shared_numbers(fields),
        num_labels=take_labels(fields),
        head_dim=head_dim,
        kinds=(Kind(window, positions),) * fields.take("num_hidden_layers"),
        activation=take_activation(fields),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=False if mistral else fields.take("mlp_bias"),
        attention_scale=head_dim**-0.5,
    )


def rows(arch: Architecture) -> tuple[Row, ...]:
    """Hugging Face's names."""
    return make_rows(arch, NAMES)

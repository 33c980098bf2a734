"""Qwen2, Qwen2.5 (biases on q, k, v) and Qwen3 (norms on q and k).

Source: `transformers/models/qwen2` and `transformers/models/qwen3`.
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
    QK_NORMS,
    Names,
    make_rows,
    shared_numbers,
    take_activation,
    take_labels,
    take_windows,
)
from fjft.models.weights import Row

MODEL = Decoder
CLASSIFIER = Classifier
HEADS = heads.DECODER_HEADS
NAMES = Names(parts=PRE_NORMS | LLAMA_ATTENTION | QK_NORMS | LLAMA_MLP)


def architecture(fields: Fields) -> Architecture:
    """Reads the config of a `qwen2` or `qwen3` checkpoint."""
    qwen3 = fields.model_type == "qwen3"
    numbers = shared_numbers(fields)
    # Qwen2's config class does not declare it, but its attention asks for it.
    head_dim = (
        fields.take("head_dim")
        if qwen3
        else fields.undeclared(
            "head_dim", numbers["hidden_size"] // numbers["num_heads"]
        )
    )
    positions = rope.from_config(
        fields.take("rope_parameters"), head_dim, fields.take("max_position_embeddings")
    )
    # transformers works `layer_types` out of these two.
    fields.ignore("use_sliding_window", "max_window_layers")
    bias = fields.take("attention_bias") if qwen3 else False
    windows = take_windows(fields, fields.take("sliding_window"))
    return Architecture(
        **numbers,
        num_labels=take_labels(fields),
        head_dim=head_dim,
        kinds=tuple(Kind(window, positions) for window in windows),
        activation=take_activation(fields),
        qkv_bias=bias if qwen3 else True,
        o_bias=bias,
        mlp_bias=False,
        attention_scale=head_dim**-0.5,
        qk_norm="head" if qwen3 else None,
    )


def rows(arch: Architecture) -> tuple[Row, ...]:
    """Hugging Face's names."""
    return make_rows(arch, NAMES)

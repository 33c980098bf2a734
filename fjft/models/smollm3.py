"""SmolLM3: a Llama of which some layers know nothing of positions.

Source: `transformers/models/smollm3`.
"""

from fjft.models import rope
from fjft.models.block import Architecture, Kind
from fjft.models.decoder import Decoder
from fjft.models.fields import Fields
from fjft.models.llama import rows
from fjft.models.names import shared_numbers, take_activation, take_windows

__all__ = ["MODEL", "architecture", "rows"]

MODEL = Decoder


def architecture(fields: Fields) -> Architecture:
    """Reads the config of a `smollm3` checkpoint."""
    numbers = shared_numbers(fields)
    # The config class does not declare it, but the attention asks for it.
    head_dim = fields.undeclared(
        "head_dim", numbers["hidden_size"] // numbers["num_heads"]
    )
    bias = fields.take("attention_bias")
    positions = rope.from_config(
        fields.take("rope_parameters"), head_dim, fields.take("max_position_embeddings")
    )
    # transformers works `layer_types` and `no_rope_layers` out of these.
    fields.ignore("use_sliding_window", "no_rope_layer_interval")
    windows = take_windows(fields, fields.take("sliding_window"))
    # The field says 1 for the layers that do rotate.
    rotates = fields.take("no_rope_layers")
    return Architecture(
        **numbers,
        head_dim=head_dim,
        kinds=tuple(
            Kind(window, positions if turned else None)
            for window, turned in zip(windows, rotates, strict=True)
        ),
        activation=take_activation(fields),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=fields.take("mlp_bias"),
        attention_scale=head_dim**-0.5,
    )

"""Llama 2, 3, 3.1, 3.2 and SmolLM2, and Mistral with its sliding window.

Source: `transformers/models/llama` and `transformers/models/mistral`.
"""

from fjft.models import rope
from fjft.models.decoder import Architecture, Decoder, rows
from fjft.models.fields import Fields

__all__ = ["MODEL", "architecture", "rows"]

MODEL = Decoder


def architecture(fields: Fields) -> Architecture:
    """Reads the config of a `llama` or `mistral` checkpoint."""
    mistral = fields.model_type == "mistral"
    window = fields.take("sliding_window") if mistral else None
    attention_bias = False if mistral else fields.take("attention_bias")
    head_dim = fields.take("head_dim")
    fields.expect("attention_dropout", 0.0)
    return Architecture(
        vocab_size=fields.take("vocab_size"),
        hidden_size=fields.take("hidden_size"),
        intermediate_size=fields.take("intermediate_size"),
        num_heads=fields.take("num_attention_heads"),
        num_kv_heads=fields.take("num_key_value_heads"),
        head_dim=head_dim,
        windows=(window,) * fields.take("num_hidden_layers"),
        frequencies=rope.inverse_frequencies(fields.take("rope_parameters"), head_dim),
        activation=fields.take("hidden_act"),
        rms_norm_eps=fields.take("rms_norm_eps"),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=False if mistral else fields.take("mlp_bias"),
        qk_norm=False,
        tie_word_embeddings=fields.take("tie_word_embeddings"),
        initializer_range=fields.take("initializer_range"),
    )

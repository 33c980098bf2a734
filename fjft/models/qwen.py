"""Qwen2, Qwen2.5 (biases on q, k, v) and Qwen3 (norms on q and k).

Source: `transformers/models/qwen2` and `transformers/models/qwen3`.
"""

from fjft.models import rope
from fjft.models.decoder import Architecture, Decoder, rows
from fjft.models.fields import Fields

__all__ = ["MODEL", "architecture", "rows"]

MODEL = Decoder


def architecture(fields: Fields) -> Architecture:
    """Reads the config of a `qwen2` or `qwen3` checkpoint."""
    qwen3 = fields.model_type == "qwen3"
    hidden_size = fields.take("hidden_size")
    num_heads = fields.take("num_attention_heads")
    head_dim = fields.take("head_dim") if qwen3 else hidden_size // num_heads
    window = fields.take("sliding_window")
    # transformers works `layer_types` out of these two.
    fields.take("use_sliding_window")
    fields.take("max_window_layers")
    fields.take("num_hidden_layers")
    fields.expect("attention_dropout", 0.0)
    attention_bias = fields.take("attention_bias") if qwen3 else False
    return Architecture(
        vocab_size=fields.take("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.take("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=fields.take("num_key_value_heads"),
        head_dim=head_dim,
        windows=tuple(
            window if kind == "sliding_attention" else None
            for kind in fields.take("layer_types")
        ),
        frequencies=rope.inverse_frequencies(fields.take("rope_parameters"), head_dim),
        activation=fields.take("hidden_act"),
        rms_norm_eps=fields.take("rms_norm_eps"),
        qkv_bias=attention_bias if qwen3 else True,
        o_bias=attention_bias,
        mlp_bias=False,
        qk_norm=qwen3,
        tie_word_embeddings=fields.take("tie_word_embeddings"),
        initializer_range=fields.take("initializer_range"),
    )

"""GPT-NeoX and Pythia: attention and MLP side by side, one map for each head's q, k, v.

Source: `transformers/models/gpt_neox`.
"""

from fjft.models import rope
from fjft.models.block import Architecture, Kind
from fjft.models.decoder import Decoder
from fjft.models.fields import Fields
from fjft.models.names import Names, make_rows, take_activation
from fjft.models.weights import Row

MODEL = Decoder
NAMES = Names(
    embedding="gpt_neox.embed_in",
    norm="gpt_neox.final_layer_norm",
    lm_head="embed_out",
    layers="gpt_neox.layers.{}.",
    parts={
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attention.qkv": "attention.query_key_value",
        "attention.o": "attention.dense",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
    },
)


def architecture(fields: Fields) -> Architecture:
    """Reads the config of a `gpt_neox` checkpoint."""
    size, heads = fields.take("hidden_size"), fields.take("num_attention_heads")
    positions = rope.from_config(
        fields.take("rope_parameters"),
        size // heads,
        fields.take("max_position_embeddings"),
        partial=True,
    )
    fields.expect_undeclared("head_dim", None)  # its rotation would ask for it
    bias, dropout = fields.take("attention_bias"), fields.take("hidden_dropout")
    fields.ignore("classifier_dropout", "is_decoder")
    return Architecture(
        vocab_size=fields.take("vocab_size"),
        hidden_size=size,
        intermediate_size=fields.take("intermediate_size"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=size // heads,
        kinds=(Kind(None, positions),) * fields.take("num_hidden_layers"),
        activation=take_activation(fields),
        norm_eps=fields.take("layer_norm_eps"),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=True,
        attention_scale=(size // heads) ** -0.5,
        attention_dropout=fields.take("attention_dropout"),
        tie_word_embeddings=fields.take("tie_word_embeddings"),
        initializer_range=fields.take("initializer_range"),
        padding_id=None,
        norm="layer",
        is_parallel=fields.take("use_parallel_residual"),
        qkv="fused_by_head",
        mlp="plain",
        residual_dropout=dropout,
        embedding_dropout=dropout,
    )


def rows(arch: Architecture) -> tuple[Row, ...]:
    """Hugging Face's names."""
    return make_rows(arch, NAMES)

"""GPT-2: learned positions, layer norms with biases, one map for q, k and v.

Its maps are stored the other way round (`Conv1D`), and the oldest checkpoints leave out
`transformer.` at the beginning of names.

Source: `transformers/models/gpt2`.
"""

import math

from fjft.models.block import Architecture, Kind
from fjft.models.decoder import Decoder
from fjft.models.fields import Fields
from fjft.models.names import Names, make_rows, take_activation
from fjft.models.weights import Row

MODEL = Decoder
MAPS = {
    "attention.qkv": "attn.c_attn",
    "attention.o": "attn.c_proj",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
NAMES = Names(
    embedding="transformer.wte",
    positions="transformer.wpe",
    norm="transformer.ln_f",
    layers="transformer.h.{}.",
    parts=MAPS | {"attention_norm": "ln_1", "mlp_norm": "ln_2"},
    transposed=frozenset(MAPS),
    optional_prefix="transformer.",
)


def architecture(fields: Fields) -> Architecture:
    """Reads the config of a `gpt2` checkpoint."""
    size, heads, layers = (fields.take(n) for n in ("n_embd", "n_head", "n_layer"))
    inner, std = fields.take("n_inner"), fields.take("initializer_range")
    fields.expect("add_cross_attention", False)
    fields.ignore("reorder_and_upcast_attn")  # scores are float32 anyway
    for part in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout"):
        fields.ignore(f"summary_{part}")  # of the double-heads model
    return Architecture(
        vocab_size=fields.take("vocab_size"),
        hidden_size=size,
        intermediate_size=4 * size if inner is None else inner,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=size // heads,
        kinds=(Kind(),) * layers,
        activation=take_activation(fields, "activation_function"),
        norm_eps=fields.take("layer_norm_epsilon"),
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        attention_scale=(size // heads) ** -0.5
        if fields.take("scale_attn_weights")
        else 1.0,
        attention_dropout=fields.take("attn_pdrop"),
        tie_word_embeddings=fields.take("tie_word_embeddings"),
        initializer_range=std,
        padding_id=None,
        norm="layer",
        qkv="fused",
        mlp="plain",
        scale_by_layer=fields.take("scale_attn_by_inverse_layer_idx"),
        residual_std=std / math.sqrt(2 * layers),
        num_positions=fields.take("n_positions"),
        residual_dropout=fields.take("resid_pdrop"),
        embedding_dropout=fields.take("embd_pdrop"),
    )


def rows(arch: Architecture) -> tuple[Row, ...]:
    """Hugging Face's names."""
    return make_rows(arch, NAMES)

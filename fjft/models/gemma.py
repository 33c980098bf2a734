"""Gemma 1, Gemma 2 (soft caps, alternating windows) and the text part of Gemma 3.

Gemma 2 and 3 write to the residual stream through norms, too, and have their own scale
of attention scores; Gemma 3 norms queries and keys, and its layers with a window have
a rotary base of their own.

Source: `transformers/models/gemma`, `gemma2` and `gemma3`.
"""

from typing import Any

from fjft.models import rope
from fjft.models.block import Architecture, Kind
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
    take_windows,
)
from fjft.models.weights import Row

MODEL = Decoder
GEMMA1 = Names(parts=PRE_NORMS | LLAMA_ATTENTION | LLAMA_MLP)
GEMMA2 = Names(
    parts={
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    }
    | LLAMA_ATTENTION
    | QK_NORMS
    | LLAMA_MLP
)


def architecture(fields: Fields) -> Architecture:
    """Reads the config of a `gemma`, `gemma2` or `gemma3_text` checkpoint."""
    numbers = shared_numbers(fields)
    head_dim, bias = fields.take("head_dim"), fields.take("attention_bias")
    fields.expect("use_bidirectional_attention", None, False)
    if fields.model_type == "gemma":
        special = _gemma1(fields, head_dim)
    elif fields.model_type == "gemma2":
        special = _gemma2(fields, head_dim)
    else:
        special = _gemma3(fields, head_dim)
    return Architecture(
        **numbers,
        **special,
        head_dim=head_dim,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=False,
        norm="rms_plus_one",
        embedding_scale=numbers["hidden_size"] ** 0.5,
    )


def _gemma1(fields: Fields, head_dim: int) -> dict[str, Any]:
    kind = Kind(None, _rope(fields, fields.take("rope_parameters"), head_dim))
    return {
        "kinds": (kind,) * fields.take("num_hidden_layers"),
        "activation": take_activation(fields),
        "attention_scale": head_dim**-0.5,
    }


def _gemma2(fields: Fields, head_dim: int) -> dict[str, Any]:
    positions = _rope(fields, fields.take("rope_parameters"), head_dim)
    windows = take_windows(fields, fields.take("sliding_window"))
    return {
        "kinds": tuple(Kind(window, positions) for window in windows),
        "activation": take_activation(fields, "hidden_activation"),
        "attention_scale": fields.take("query_pre_attn_scalar") ** -0.5,
        "attention_softcap": fields.take("attn_logit_softcapping"),
        "logit_softcap": fields.take("final_logit_softcapping"),
        "post_norm": True,
    }


def _gemma3(fields: Fields, head_dim: int) -> dict[str, Any]:
    parameters, layers = fields.take("rope_parameters"), fields.take("layer_types")
    limit = fields.take("max_position_embeddings")
    ropes = {
        kind: rope.from_config(parameters[kind], head_dim, limit)
        for kind in dict.fromkeys(layers)
    }
    windows = take_windows(fields, fields.take("sliding_window"), layers)
    fields.ignore("_sliding_window_pattern")  # worked into `layer_types`
    # Its attention has this number and does not use it.
    fields.expect("attn_logit_softcapping", None)
    return {
        "kinds": tuple(
            Kind(window, ropes[layer])
            for window, layer in zip(windows, layers, strict=True)
        ),
        "activation": take_activation(fields, "hidden_activation"),
        "attention_scale": fields.take("query_pre_attn_scalar") ** -0.5,
        "logit_softcap": fields.take("final_logit_softcapping"),
        "post_norm": True,
        "qk_norm": "head",
    }


def _rope(fields: Fields, parameters: dict[str, Any], head_dim: int) -> rope.Rope:
    return rope.from_config(
        parameters, head_dim, fields.take("max_position_embeddings")
    )


def rows(arch: Architecture) -> tuple[Row, ...]:
    """Hugging Face's names."""
    return make_rows(arch, GEMMA2 if arch.post_norm else GEMMA1)

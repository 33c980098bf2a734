"""What Hugging Face calls the parts of a decoder, and the fields that they share."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fjft.errors import UserError
from fjft.models.block import Architecture
from fjft.models.fields import Fields
from fjft.models.layers import ACTIVATIONS
from fjft.models.weights import Row


def shared_numbers(fields: Fields) -> dict[str, Any]:
    """The numbers that most configs have under the names that Llama's has."""
    return {
        "vocab_size": fields.take("vocab_size"),
        "hidden_size": fields.take("hidden_size"),
        "intermediate_size": fields.take("intermediate_size"),
        "num_heads": fields.take("num_attention_heads"),
        "num_kv_heads": fields.take("num_key_value_heads"),
        "norm_eps": fields.take("rms_norm_eps"),
        "attention_dropout": fields.take("attention_dropout"),
        "tie_word_embeddings": fields.take("tie_word_embeddings"),
        "initializer_range": fields.take("initializer_range"),
        "padding_id": fields.take("pad_token_id"),
    }


def take_activation(fields: Fields, name: str = "hidden_act") -> str:
    """The name of an activation that is known."""
    return fields.choose(name, ACTIVATIONS)


def take_labels(fields: Fields) -> int | None:
    """How many labels the head tells apart, if it is one for whole texts."""
    architecture = fields.architecture or ""
    is_classifier = architecture.endswith("ForSequenceClassification")
    return fields.num_labels if is_classifier else None


def take_balance(fields: Fields) -> float:
    """The weight of the experts' balance in the loss; 0 if the config wants none."""
    wanted = fields.take("output_router_logits")
    coefficient = fields.take("router_aux_loss_coef")
    return coefficient if wanted else 0.0


def take_windows(
    fields: Fields, window: int | None, layer_types: list[str] | None = None
) -> list[int | None]:
    """The window of each layer, by `layer_types`.

    Args:
      fields: The config.
      window: That of sliding layers.
      layer_types: The field, if it has been taken already.

    Raises:
      UserError: A layer is of an unknown type, or slides without a window.
    """
    fields.ignore("num_hidden_layers")  # the length of `layer_types`
    kinds = fields.take("layer_types") if layer_types is None else layer_types
    windows = {"sliding_attention": window, "full_attention": None}
    unknown = sorted(set(kinds) - set(windows))
    if unknown:
        raise UserError(
            f"{fields.model_type} config: layer_types has {unknown}; supported: "
            f"{list(windows)}"
        )
    if "sliding_attention" in kinds and not window:
        raise UserError(
            f"{fields.model_type} config: layer_types has 'sliding_attention', but "
            f"sliding_window is {window}"
        )
    return [windows[kind] for kind in kinds]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """What Hugging Face calls the parts of a decoder family.

    Attributes:
      embedding: Token vectors.
      norm: The last norm.
      layers: What stands before the parts of a layer, with `{}` for its number.
      parts: Our path in a layer -> theirs.
      lm_head: The output head.
      positions: Learned positions.
      transposed: Those of our paths whose matrices lie the other way round.
      optional_prefix: What some checkpoints leave out at the beginning of names.
    """

    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    layers: str = "model.layers.{}."
    parts: Mapping[str, str]
    lm_head: str = "lm_head"
    positions: str = ""
    transposed: frozenset[str] = frozenset()
    optional_prefix: str = ""


# As Llama and most others have them.
LLAMA_ATTENTION = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
}
QK_NORMS = {
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
}
LLAMA_MLP = {
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
PRE_NORMS = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}


def make_rows(arch: Architecture, names: Names) -> tuple[Row, ...]:
    """The name table of a family.

    Args:
      arch: Says which parts have biases.
      names: Parts that no layer of this model has are passed over.
    """
    top = {"embedding": names.embedding, "norm": names.norm}
    if arch.num_positions is not None:
        top["positions"] = names.positions
    if not arch.tie_word_embeddings and arch.num_labels is None:
        top["lm_head"] = names.lm_head
    paths = {path: (hf, path) for path, hf in top.items()}
    paths |= {
        path: (f"{names.layers}{hf}", f"layers.{{}}.{path}")
        for path, hf in names.parts.items()
    }
    table = []
    for path, (hf, full_path) in paths.items():
        for leaf in _leaves(arch, path):
            row = Row(
                f"{hf}{leaf}",
                f"{full_path}{leaf}",
                transpose=path in names.transposed and leaf == ".weight",
            )
            if path.startswith("moe.experts."):
                assert arch.experts is not None
                # One matrix an expert in a checkpoint, one of all experts here.
                row = Row(f"{hf}.weight", full_path, experts=arch.experts.count)
            if names.optional_prefix:
                alias = row.hf.removeprefix(names.optional_prefix)
                row = dataclasses.replace(row, aliases=(alias,))
            if path == "embedding" and arch.tie_word_embeddings:
                # A tied head may be stored besides the embedding it is tied to.
                tied = (*row.aliases, f"{names.lm_head}.weight")
                row = dataclasses.replace(row, aliases=tied)
            table.append(row)
    if arch.num_labels is not None:
        table.append(Row("score.weight", "score.weight", head=True))
    return tuple(table)


def _leaves(arch: Architecture, path: str) -> tuple[str, ...]:
    """What a part is made of."""
    biased = {
        "attention.q": arch.qkv_bias,
        "attention.k": arch.qkv_bias,
        "attention.v": arch.qkv_bias,
        "attention.qkv": arch.qkv_bias,
        "attention.o": arch.o_bias,
    }
    if path.startswith("moe.experts."):
        return ("",)
    is_norm, is_mlp = path.endswith("norm"), path.startswith("mlp.")
    bias = biased.get(path, False)
    bias = bias or (is_norm and arch.norm == "layer") or (is_mlp and arch.mlp_bias)
    return (".weight", ".bias") if bias else (".weight",)

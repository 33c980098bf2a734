"""DistilBERT: BERT without token types and without a pooler, under its own names.

Source: `transformers/models/distilbert`.
"""

import dataclasses

from fjft.models import encoder_head, heads
from fjft.models.bert import embedding_rows
from fjft.models.encoder import Encoder, named_rows
from fjft.models.encoder_block import Architecture, Dropout
from fjft.models.encoder_head import Plan
from fjft.models.fields import Fields
from fjft.models.layers import ACTIVATIONS
from fjft.models.weights import Row, linear_rows, norm_rows

__all__ = ["HEADS", "MODEL", "architecture", "rows"]

MODEL = Encoder
HEADS = heads.ENCODER_HEADS

# The config has no field for it; transformers' model has this number.
_NORM_EPS = 1e-12


def architecture(fields: Fields) -> Architecture:
    """Reads the config of a `distilbert` checkpoint."""
    # Only the initial values of the table of positions depend on it.
    fields.ignore("sinusoidal_pos_embds")
    size = fields.take("dim")
    kind = heads.find(fields.architecture)
    dropouts = {
        "sequence_classification": fields.take("seq_classif_dropout"),
        "question_answering": fields.take("qa_dropout"),
    }
    hidden_dropout = fields.take("dropout")
    arch = Architecture(
        base_name="distilbert",
        vocab_size=fields.take("vocab_size"),
        embedding_size=size,
        hidden_size=size,
        intermediate_size=fields.take("hidden_dim"),
        num_heads=fields.take("n_heads"),
        num_layers=fields.take("n_layers"),
        activation=fields.choose("activation", ACTIVATIONS),
        norm_eps=_NORM_EPS,
        norm_bias=True,
        projection="",
        num_positions=fields.take("max_position_embeddings"),
        position_offset=0,
        num_types=0,
        padding_id=fields.take("pad_token_id"),
        initializer_range=fields.take("initializer_range"),
        cutoff=None,
        dropout=Dropout(
            embedding=hidden_dropout,
            attention=fields.take("attention_dropout"),
            attention_output=0.0,
            mlp=hidden_dropout,
        ),
        plan=Plan(kind=kind),
    )
    tied = fields.take("tie_word_embeddings")
    dropout = dropouts.get(kind, hidden_dropout)
    plan = _plan(arch, tied=tied, num_labels=fields.num_labels, dropout=dropout)
    return dataclasses.replace(arch, plan=plan)


def _plan(arch: Architecture, *, tied: bool, num_labels: int, dropout: float) -> Plan:
    kind, std = arch.plan.kind, arch.initializer_range
    if kind == "base":
        return arch.plan
    if kind == "masked_lm":
        plan = Plan(
            kind=kind,
            dense="vocab_transform",
            dense_size=arch.hidden_size,
            dense_std=std,
            activation=arch.activation,
            norm="vocab_layer_norm",
            norm_eps=arch.norm_eps,
            output_std=std,
            num_outputs=arch.vocab_size,
        )
        return encoder_head.with_outputs(plan, "vocab_projector", tied=tied)
    output = "qa_outputs" if kind == "question_answering" else "classifier"
    plan = encoder_head.classifier(
        kind, output, num_labels=num_labels, std=std, dropout=dropout
    )
    if kind != "sequence_classification":
        return plan
    return dataclasses.replace(
        plan,
        dense="pre_classifier",
        dense_size=arch.hidden_size,
        dense_std=std,
        activation="relu",
    )


def rows(arch: Architecture) -> tuple[Row, ...]:
    """Hugging Face's names."""
    linear = {
        "attention.q_lin": "attention.q",
        "attention.k_lin": "attention.k",
        "attention.v_lin": "attention.v",
        "attention.out_lin": "attention.o",
        "ffn.lin1": "up",
        "ffn.lin2": "down",
    }
    norms = {"sa_layer_norm": "attention_norm", "output_layer_norm": "mlp_norm"}
    layer = "distilbert.transformer.layer.{}"
    table = [*embedding_rows(arch)]
    for hf, ours in linear.items():
        table += linear_rows(f"{layer}.{hf}", f"layers.{{}}.{ours}")
    for hf, ours in norms.items():
        table += norm_rows(f"{layer}.{hf}", f"layers.{{}}.{ours}")
    return named_rows(arch, [*table, *arch.plan.rows()])

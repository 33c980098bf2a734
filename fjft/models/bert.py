"""BERT, RoBERTa, XLM-RoBERTa and ELECTRA.

They differ in where positions start, in what stands between the token vectors and the
first layer, and in the heads.

Source: `transformers/models/bert`, `roberta`, `xlm_roberta` and `electra`.
"""

import dataclasses
from typing import Any

from fjft.models import encoder_head, heads
from fjft.models.encoder import Encoder, named_rows
from fjft.models.encoder_block import Architecture, Dropout
from fjft.models.encoder_head import Plan
from fjft.models.fields import Fields
from fjft.models.layers import ACTIVATIONS
from fjft.models.weights import Row, linear_rows, norm_rows

__all__ = ["HEADS", "MODEL", "architecture", "rows"]

MODEL = Encoder
HEADS = heads.ENCODER_HEADS

_PREFIXES = {
    "bert": "bert",
    "roberta": "roberta",
    "xlm-roberta": "roberta",
    "electra": "electra",
}


def architecture(fields: Fields) -> Architecture:
    """Reads the config of one of these families."""
    fields.expect("is_decoder", False)
    fields.expect("add_cross_attention", False)
    # Newer versions of transformers pass over what was once an option.
    fields.expect_undeclared("position_embedding_type", "absolute")
    is_electra = fields.model_type == "electra"
    is_roberta = _PREFIXES[fields.model_type] == "roberta"
    hidden_size = fields.take("hidden_size")
    embedding_size = fields.take("embedding_size") if is_electra else hidden_size
    if is_electra:  # of the head for multiple choice
        fields.ignore("summary_type", "summary_use_proj", "summary_activation")
        fields.ignore("summary_last_dropout")
    padding_id = fields.take("pad_token_id")
    hidden_dropout = fields.take("hidden_dropout_prob")
    classifier_dropout = fields.take("classifier_dropout")
    if classifier_dropout is None:
        classifier_dropout = hidden_dropout
    arch = Architecture(
        base_name=_PREFIXES[fields.model_type],
        vocab_size=fields.take("vocab_size"),
        embedding_size=embedding_size,
        hidden_size=hidden_size,
        intermediate_size=fields.take("intermediate_size"),
        num_heads=fields.take("num_attention_heads"),
        num_layers=fields.take("num_hidden_layers"),
        activation=fields.choose("hidden_act", ACTIVATIONS),
        norm_eps=fields.take("layer_norm_eps"),
        norm_bias=True,
        projection="after" if embedding_size != hidden_size else "",
        num_positions=fields.take("max_position_embeddings"),
        position_offset=padding_id + 1 if is_roberta else 0,
        num_types=fields.take("type_vocab_size"),
        padding_id=padding_id,
        initializer_range=fields.take("initializer_range"),
        cutoff=None,
        dropout=Dropout(
            embedding=hidden_dropout,
            attention=fields.take("attention_probs_dropout_prob"),
            attention_output=hidden_dropout,
            mlp=hidden_dropout,
        ),
        plan=Plan(kind=heads.find(fields.architecture)),
    )
    tied = fields.take("tie_word_embeddings")
    plan = _plan(
        arch, tied=tied, num_labels=fields.num_labels, dropout=classifier_dropout
    )
    return dataclasses.replace(arch, plan=plan)


def _plan(arch: Architecture, *, tied: bool, num_labels: int, dropout: float) -> Plan:
    kind, family, std = arch.plan.kind, arch.base_name, arch.initializer_range
    if kind == "masked_lm":
        plan = _masked_lm(arch, tied)
        return dataclasses.replace(
            plan, dense_size=arch.embedding_size, norm_eps=arch.norm_eps
        )
    pooler = {"dense_size": arch.hidden_size, "dense_std": std, "activation": "tanh"}
    if kind == "base":
        if family == "electra":
            return arch.plan
        return dataclasses.replace(arch.plan, dense=f"{family}.pooler.dense", **pooler)
    numbers: dict[str, Any] = {"num_labels": num_labels, "std": std, "dropout": dropout}
    if kind == "sequence_classification":
        dense, output = "bert.pooler.dense", "classifier"
        if family != "bert":  # the head has a pooler of its own
            dense, output = "classifier.dense", "classifier.out_proj"
            pooler["input_dropout"] = dropout
        if family == "electra":
            pooler["activation"] = "gelu"
        plan = encoder_head.classifier(kind, output, **numbers)
        return dataclasses.replace(plan, dense=dense, **pooler)
    if kind == "question_answering":
        return encoder_head.classifier(
            kind, "qa_outputs", **{**numbers, "dropout": 0.0}
        )
    return encoder_head.classifier(kind, "classifier", **numbers)


def _masked_lm(arch: Architecture, tied: bool) -> Plan:
    numbers = {"num_outputs": arch.vocab_size, "std": arch.initializer_range}
    if arch.base_name == "bert":
        plan = encoder_head.masked_lm(
            "cls.predictions",
            dense="transform.dense",
            norm="transform.LayerNorm",
            tied=tied,
            **numbers,
        )
        return dataclasses.replace(plan, activation=arch.activation)
    if arch.base_name == "roberta":
        plan = encoder_head.masked_lm(
            "lm_head", dense="dense", norm="layer_norm", tied=tied, **numbers
        )
        return dataclasses.replace(plan, activation="gelu")
    plan = encoder_head.masked_lm(
        "generator_predictions", dense="dense", norm="LayerNorm", tied=tied, **numbers
    )
    plan = encoder_head.with_outputs(plan, "generator_lm_head", tied=tied)
    return dataclasses.replace(plan, activation="gelu")


def rows(arch: Architecture) -> tuple[Row, ...]:
    """Hugging Face's names."""
    linear = {
        "attention.self.query": "attention.q",
        "attention.self.key": "attention.k",
        "attention.self.value": "attention.v",
        "attention.output.dense": "attention.o",
        "intermediate.dense": "up",
        "output.dense": "down",
    }
    norms = {
        "attention.output.LayerNorm": "attention_norm",
        "output.LayerNorm": "mlp_norm",
    }
    layer = f"{arch.base_name}.encoder.layer.{{}}"
    table = [*embedding_rows(arch)]
    if arch.projection:
        table += linear_rows(
            f"{arch.base_name}.embeddings_project", "embeddings.project"
        )
    for hf, ours in linear.items():
        table += linear_rows(f"{layer}.{hf}", f"layers.{{}}.{ours}")
    for hf, ours in norms.items():
        table += norm_rows(f"{layer}.{hf}", f"layers.{{}}.{ours}")
    return named_rows(arch, [*table, *arch.plan.rows()])


def embedding_rows(arch: Architecture) -> list[Row]:
    """The rows of the embeddings, as BERT and its kin name them."""
    hf = f"{arch.base_name}.embeddings"
    tied = (arch.plan.tied_alias,) if arch.plan.tied_alias else ()
    words = f"{hf}.word_embeddings.weight"
    table = [Row(words, "embeddings.words.weight", aliases=tied)]
    if arch.num_positions:
        position = f"{hf}.position_embeddings.weight"
        table.append(Row(position, "embeddings.positions.weight"))
    if arch.num_types:
        types = f"{hf}.token_type_embeddings.weight"
        table.append(Row(types, "embeddings.types.weight"))
    return [*table, *norm_rows(f"{hf}.LayerNorm", "embeddings.norm")]

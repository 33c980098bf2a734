"""DeBERTa v2 and v3.

Source: `transformers/models/deberta_v2`.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from fjft.errors import UserError
from fjft.models import encoder_head, heads
from fjft.models.bert import embedding_rows
from fjft.models.deberta_attention import Convolution, DebertaArchitecture, DebertaBlock
from fjft.models.encoder import Encoder, named_rows
from fjft.models.encoder_block import Dropout
from fjft.models.encoder_head import Plan
from fjft.models.fields import Fields
from fjft.models.layers import ACTIVATIONS, Embedding, LayerNorm, Maker
from fjft.models.mask import full_mask
from fjft.models.stack import REMAT_POLICIES, Stack
from fjft.models.weights import Row, linear_rows, norm_rows

__all__ = ["HEADS", "MODEL", "architecture", "rows"]

HEADS = heads.ENCODER_HEADS


class Deberta(Encoder):
    """An encoder with relative positions, and maybe a convolution."""

    def __init__(
        self,
        arch: DebertaArchitecture,
        make: Maker,
        compute_dtype: jax.typing.DTypeLike,
        cuts: tuple[int, ...] = (),
    ):
        super().__init__(arch, make, compute_dtype, cuts)
        relative = norm = conv = None
        if arch.relative:
            relative = Embedding(
                make,
                2 * arch.span,
                arch.hidden_size,
                std=arch.initializer_range,
                axis="positions",
            )
        if arch.norm_positions:
            norm = LayerNorm(make, arch.hidden_size, eps=arch.norm_eps, bias=True)
        if arch.conv_size:
            conv = Convolution(make, arch)
        self.relative: Embedding | None = nnx.data(relative)
        self.relative_norm: LayerNorm | None = nnx.data(norm)
        self.conv: Convolution | None = nnx.data(conv)

    @staticmethod
    def make_layers(
        arch: DebertaArchitecture, make: Maker, cuts: tuple[int, ...]
    ) -> Stack:
        """The layers; only the first may have a convolution beside it."""
        kinds = (arch.conv_size > 0, *(False,) * (arch.num_layers - 1))
        return Stack(
            make, lambda make, kind: DebertaBlock(make, arch, kind), kinds, cuts
        )

    def embed(
        self,
        input_ids_BT: Int[Array, "B T"],
        positions_BS: Int[Array, "B S"],
        segment_ids_BS: Int[Array, "B S"],
        token_type_ids_BS: Int[Array, "B S"] | None = None,
        rng: Key[Array, ""] | None = None,
    ) -> Float[Array, "B S D"]:
        """What the first layer gets, in the compute dtype; zero for padding."""
        x_BSD = super().embed(
            input_ids_BT, positions_BS, segment_ids_BS, token_type_ids_BS, rng
        )
        return jnp.where((segment_ids_BS != 0)[..., None], x_BSD, 0)

    def backbone(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"],
        *,
        rng: Key[Array, ""] | None = None,
        remat: str = "none",
    ) -> Float[Array, "B T D"]:
        """All layers; see `Encoder.backbone`."""
        relative = None
        if self.relative is not None:
            relative = self.relative.weight[...].astype(x_BTD.dtype)
            if self.relative_norm is not None:
                relative = self.relative_norm(relative)
        context = full_mask(segment_ids_BT), relative
        embedded_BTD = x_BTD

        def body(block, x, layer):
            key = None if rng is None else jax.random.fold_in(rng, layer)
            x = block(x, context, key)
            if block.has_conv and self.conv is not None:
                x = self.conv(embedded_BTD, x, segment_ids_BT, key)
            return x

        return self.layers.scan(body, x_BTD, REMAT_POLICIES[remat])


MODEL = Deberta


def architecture(fields: Fields) -> DebertaArchitecture:
    """Reads the config of a `deberta-v2` checkpoint, which v3's are too."""
    hidden_size = fields.take("hidden_size")
    num_heads = fields.take("num_attention_heads")
    # transformers' model would not run with other values of these two.
    fields.expect_undeclared("attention_head_size", hidden_size // num_heads)
    fields.expect("pooler_hidden_size", hidden_size)
    embedding_size = fields.undeclared("embedding_size", hidden_size)
    num_positions = fields.take("max_position_embeddings")
    max_distance = fields.take("max_relative_positions")
    max_distance = num_positions if max_distance < 1 else max_distance
    buckets = fields.undeclared("position_buckets", -1)
    terms = fields.take("pos_att_type") or ()
    hidden_dropout = fields.take("hidden_dropout_prob")
    conv_size = max(fields.undeclared("conv_kernel_size", 0), 0)
    if conv_size and conv_size % 2 == 0:
        raise UserError(f"deberta-v2 config: conv_kernel_size={conv_size} is not odd")
    conv_activation = fields.undeclared("conv_act", "tanh")
    if conv_activation not in ACTIVATIONS:
        raise UserError(f"deberta-v2 config: conv_act={conv_activation!r} is unknown")
    relative_norm = fields.undeclared("norm_rel_ebd", "none").lower().split("|")
    arch = DebertaArchitecture(
        base_name="deberta",
        vocab_size=fields.take("vocab_size"),
        embedding_size=embedding_size,
        hidden_size=hidden_size,
        intermediate_size=fields.take("intermediate_size"),
        num_heads=num_heads,
        num_layers=fields.take("num_hidden_layers"),
        activation=fields.choose("hidden_act", ACTIVATIONS),
        norm_eps=fields.take("layer_norm_eps"),
        norm_bias=True,
        projection="before" if embedding_size != hidden_size else "",
        num_positions=num_positions if fields.take("position_biased_input") else 0,
        position_offset=0,
        num_types=fields.take("type_vocab_size"),
        padding_id=fields.take("pad_token_id"),
        initializer_range=fields.take("initializer_range"),
        cutoff=None,
        dropout=Dropout(
            embedding=hidden_dropout,
            attention=fields.take("attention_probs_dropout_prob"),
            attention_output=hidden_dropout,
            mlp=hidden_dropout,
        ),
        plan=Plan(kind=heads.find(fields.architecture)),
        relative=fields.take("relative_attention"),
        terms=tuple(term for term in ("c2p", "p2c") if term in terms),
        span=buckets if buckets > 0 else max_distance,
        buckets=buckets,
        max_distance=max_distance,
        share_keys=fields.undeclared("share_att_key", False),
        norm_positions="layer_norm" in map(str.strip, relative_norm),
        conv_size=conv_size,
        conv_groups=fields.undeclared("conv_groups", 1),
        conv_activation=conv_activation,
        hidden_dropout=hidden_dropout,
    )
    classifier_dropout = fields.undeclared("cls_dropout", None)
    if classifier_dropout is None:
        classifier_dropout = hidden_dropout
    plan = _plan(
        arch,
        tied=fields.take("tie_word_embeddings"),
        legacy=fields.take("legacy"),
        pooler_activation=fields.choose("pooler_hidden_act", ACTIVATIONS),
        num_labels=fields.num_labels,
        pooler_dropout=fields.take("pooler_dropout"),
        classifier_dropout=classifier_dropout,
    )
    return dataclasses.replace(arch, plan=plan)


def _plan(
    arch: DebertaArchitecture,
    *,
    tied: bool,
    legacy: bool,
    pooler_activation: str,
    num_labels: int,
    pooler_dropout: float,
    classifier_dropout: float,
) -> Plan:
    kind, std = arch.plan.kind, arch.initializer_range
    if kind == "base":
        return arch.plan
    if kind == "masked_lm":
        plan = encoder_head.masked_lm(
            "cls.predictions" if legacy else "lm_predictions.lm_head",
            dense="transform.dense" if legacy else "dense",
            norm="transform.LayerNorm" if legacy else "LayerNorm",
            tied=tied or not legacy,
            num_outputs=arch.vocab_size,
            std=std,
        )
        return dataclasses.replace(
            plan,
            dense_size=arch.embedding_size if legacy else arch.hidden_size,
            activation=arch.activation,
            norm_eps=arch.norm_eps,
        )
    dropouts = {
        "sequence_classification": classifier_dropout,
        "token_classification": arch.hidden_dropout,
        "question_answering": 0.0,
    }
    plan = encoder_head.classifier(
        kind,
        "qa_outputs" if kind == "question_answering" else "classifier",
        num_labels=num_labels,
        std=std,
        dropout=dropouts[kind],
    )
    if kind != "sequence_classification":
        return plan
    return dataclasses.replace(
        plan,
        dense="pooler.dense",
        dense_size=arch.hidden_size,
        dense_std=std,
        activation=pooler_activation,
        input_dropout=pooler_dropout,
    )


def rows(arch: DebertaArchitecture) -> tuple[Row, ...]:
    """Hugging Face's names."""
    linear = {
        "attention.self.query_proj": "attention.q",
        "attention.self.key_proj": "attention.k",
        "attention.self.value_proj": "attention.v",
        "attention.output.dense": "attention.o",
        "intermediate.dense": "up",
        "output.dense": "down",
    }
    if arch.relative and not arch.share_keys:
        if "c2p" in arch.terms:
            linear["attention.self.pos_key_proj"] = "attention.position_k"
        if "p2c" in arch.terms:
            linear["attention.self.pos_query_proj"] = "attention.position_q"
    norms = {
        "attention.output.LayerNorm": "attention_norm",
        "output.LayerNorm": "mlp_norm",
    }
    table = [*embedding_rows(arch), *_encoder_rows(arch)]
    layer = "deberta.encoder.layer.{}"
    for hf, ours in linear.items():
        table += linear_rows(f"{layer}.{hf}", f"layers.{{}}.{ours}")
    for hf, ours in norms.items():
        table += norm_rows(f"{layer}.{hf}", f"layers.{{}}.{ours}")
    return named_rows(arch, [*table, *arch.plan.rows()])


def _encoder_rows(arch: DebertaArchitecture) -> Sequence[Row]:
    hf, table = "deberta.encoder", []
    if arch.projection:
        project = "deberta.embeddings.embed_proj"
        table += linear_rows(project, "embeddings.project", bias=False)
    if arch.relative:
        table.append(Row(f"{hf}.rel_embeddings.weight", "relative.weight"))
    if arch.norm_positions:
        table += norm_rows(f"{hf}.LayerNorm", "relative_norm")
    if arch.conv_size:
        table += linear_rows(f"{hf}.conv.conv", "conv")
        table += norm_rows(f"{hf}.conv.LayerNorm", "conv.norm")
    return table

"""ALBERT: layers in groups that share their weights (Lan et al. 2019).

A checkpoint holds `num_hidden_groups * inner_group_num` layers; the model runs through
them, group after group, until `num_hidden_layers` groups have been passed, each one
several times in a row.

Source: `transformers/models/albert`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from fjft.errors import UserError
from fjft.models import encoder_head, heads
from fjft.models.bert import embedding_rows
from fjft.models.encoder import Encoder, named_rows
from fjft.models.encoder_block import Architecture, Block, Dropout
from fjft.models.encoder_head import Plan
from fjft.models.fields import Fields
from fjft.models.layers import ACTIVATIONS, Maker, Shared
from fjft.models.mask import full_mask
from fjft.models.stack import REMAT_POLICIES, Stack
from fjft.models.weights import Row, linear_rows, norm_rows

__all__ = ["HEADS", "MODEL", "architecture", "rows"]

HEADS = heads.ENCODER_HEADS


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlbertArchitecture(Architecture):
    """What ALBERT has besides.

    Attributes:
      num_groups: Groups of layers that have weights of their own.
      group_size: Layers in each group.
    """

    num_groups: int
    group_size: int


class Albert(Encoder):
    """An encoder whose weights are those of a few layers, used many times."""

    @staticmethod
    def make_layers(
        arch: AlbertArchitecture, make: Maker, cuts: tuple[int, ...]
    ) -> Stack:
        """The layers that have weights of their own: group by group, stacked.

        Raises:
          UserError: The stack shall be cut, which shared weights do not allow.
        """
        if cuts:
            raise UserError(
                "ALBERT's layers share their weights, so its last ones cannot be "
                "trained without the others; use peft.method=lora or full"
            )
        kinds = (None,) * (arch.num_groups * arch.group_size)
        return Stack(make, lambda make, kind: Block(make, arch), kinds)

    def backbone(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"],
        *,
        rng: Key[Array, ""] | None = None,
        remat: str = "none",
    ) -> Float[Array, "B T D"]:
        """All layers, in the order in which they are used."""
        mask = full_mask(segment_ids_BT)
        graphdef, shared, weights = nnx.split(self.layers.blocks[0], Shared, ...)

        def step(x, use):
            number, place = use
            mine = jax.tree.map(lambda w: w[place], weights)
            key = None if rng is None else jax.random.fold_in(rng, number)
            return nnx.merge(graphdef, shared, mine)(x, mask, key), None

        order = jnp.array(_order(self.arch), jnp.int32)
        uses = jnp.arange(len(order), dtype=jnp.int32), order
        x_BTD, _ = jax.lax.scan(REMAT_POLICIES[remat](step), x_BTD, uses)
        return x_BTD


MODEL = Albert


def _order(arch: AlbertArchitecture) -> list[int]:
    """The stored layer that each step uses: 4 passes of 2 groups are `0 0 1 1`."""
    groups = [
        int(i / (arch.num_layers / arch.num_groups)) for i in range(arch.num_layers)
    ]
    inner = range(arch.group_size)
    return [group * arch.group_size + layer for group in groups for layer in inner]


def architecture(fields: Fields) -> AlbertArchitecture:
    """Reads the config of an `albert` checkpoint."""
    # Newer versions of transformers pass over what was once an option.
    fields.expect_undeclared("position_embedding_type", "absolute")
    hidden_dropout = fields.take("hidden_dropout_prob")
    classifier_dropout = fields.take("classifier_dropout_prob")
    arch = AlbertArchitecture(
        base_name="albert",
        vocab_size=fields.take("vocab_size"),
        embedding_size=fields.take("embedding_size"),
        hidden_size=fields.take("hidden_size"),
        intermediate_size=fields.take("intermediate_size"),
        num_heads=fields.take("num_attention_heads"),
        num_layers=fields.take("num_hidden_layers"),
        num_groups=fields.take("num_hidden_groups"),
        group_size=fields.take("inner_group_num"),
        activation=fields.choose("hidden_act", ACTIVATIONS),
        norm_eps=fields.take("layer_norm_eps"),
        norm_bias=True,
        projection="after",
        num_positions=fields.take("max_position_embeddings"),
        position_offset=0,
        num_types=fields.take("type_vocab_size"),
        padding_id=fields.take("pad_token_id"),
        initializer_range=fields.take("initializer_range"),
        cutoff=None,
        dropout=Dropout(
            embedding=hidden_dropout,
            attention=fields.take("attention_probs_dropout_prob"),
            attention_output=hidden_dropout,
            mlp=0.0,
        ),
        plan=Plan(kind=heads.find(fields.architecture)),
    )
    tied = fields.take("tie_word_embeddings")
    plan = _plan(
        arch, tied=tied, num_labels=fields.num_labels, dropout=classifier_dropout
    )
    return dataclasses.replace(arch, plan=plan)


def _plan(
    arch: AlbertArchitecture, *, tied: bool, num_labels: int, dropout: float
) -> Plan:
    kind, std = arch.plan.kind, arch.initializer_range
    if kind == "masked_lm":
        plan = encoder_head.masked_lm(
            "predictions",
            dense="dense",
            norm="LayerNorm",
            tied=tied,
            num_outputs=arch.vocab_size,
            std=std,
        )
        return dataclasses.replace(
            plan,
            dense_size=arch.embedding_size,
            activation=arch.activation,
            norm_eps=arch.norm_eps,
        )
    plan = arch.plan
    if kind != "base":
        is_qa = kind == "question_answering"
        plan = encoder_head.classifier(
            kind,
            "qa_outputs" if is_qa else "classifier",
            num_labels=num_labels,
            std=std,
            dropout=0.0 if is_qa else dropout,
        )
    if kind in ("question_answering", "token_classification"):
        return plan
    return dataclasses.replace(
        plan,
        dense="albert.pooler",
        dense_size=arch.hidden_size,
        dense_std=std,
        activation="tanh",
    )


def rows(arch: AlbertArchitecture) -> tuple[Row, ...]:
    """Hugging Face's names."""
    linear = {
        "attention.query": "attention.q",
        "attention.key": "attention.k",
        "attention.value": "attention.v",
        "attention.dense": "attention.o",
        "ffn": "up",
        "ffn_output": "down",
    }
    norms = {
        "attention.LayerNorm": "attention_norm",
        "full_layer_layer_norm": "mlp_norm",
    }
    project = "albert.encoder.embedding_hidden_mapping_in"
    table = [*embedding_rows(arch), *linear_rows(project, "embeddings.project")]
    layer = "albert.encoder.albert_layer_groups.{}.albert_layers.{}"
    for hf, ours in linear.items():
        table += linear_rows(f"{layer}.{hf}", f"layers.{{}}.{ours}")
    for hf, ours in norms.items():
        table += norm_rows(f"{layer}.{hf}", f"layers.{{}}.{ours}")
    table = [
        dataclasses.replace(row, group_size=arch.group_size)
        if ".{}." in row.path
        else row
        for row in table
    ]
    return named_rows(arch, [*table, *arch.plan.rows()])

"""ModernBERT: pre-norm, rope, gated MLPs, local and global attention in turns.

Source: `transformers/models/modernbert`.
"""

import dataclasses
import math

import jax
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from fjft.models import encoder_head, heads, rope
from fjft.models.attention import Attending, attention
from fjft.models.encoder import Encoder, named_rows
from fjft.models.encoder_block import Architecture, Dropout
from fjft.models.encoder_head import Plan
from fjft.models.fields import Fields
from fjft.models.layers import ACTIVATIONS, LayerNorm, Linear, Maker, dropout, own_key
from fjft.models.mask import Mask, Places
from fjft.models.stack import REMAT_POLICIES, Stack
from fjft.models.weights import Row, linear_rows, norm_rows
from fjft.sharding import constrain

__all__ = ["HEADS", "MODEL", "architecture", "rows"]

HEADS = heads.ENCODER_HEADS


@dataclasses.dataclass(frozen=True)
class Kind:
    """What the compiler must know of one layer.

    Attributes:
      is_local: Whether it sees a window only.
      has_norm: Whether attention reads through a norm; in the first layer it does not,
        since the embeddings have just been through one.
    """

    is_local: bool
    has_norm: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModernBertArchitecture(Architecture):
    """What ModernBERT has besides.

    Attributes:
      kinds: Of each layer, in order.
      window: Local attention sees tokens less than this far away.
      ropes: How positions turn queries and keys, by whether attention is local.
      attention_bias: Whether attention's maps have biases.
      mlp_bias: Whether the MLP's do.
      residual_std: Standard deviation of new weights of maps into the residual stream.
    """

    kinds: tuple[Kind, ...]
    window: int
    ropes: tuple[tuple[bool, rope.Rope], ...]
    attention_bias: bool
    mlp_bias: bool
    residual_std: float


# By whether attention is local: which keys are seen, and how positions turn.
Context = dict[bool, tuple[Mask, rope.Rotation]]


class Block(Attending):
    """One layer: `x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, make: Maker, arch: ModernBertArchitecture, kind: Kind):
        size, wide = arch.hidden_size, arch.intermediate_size
        norm = {"eps": arch.norm_eps, "bias": arch.norm_bias}
        drawn_in = {"std": arch.initializer_range, "cutoff": arch.cutoff}
        drawn_out = {"std": arch.residual_std, "cutoff": arch.cutoff}
        bias = arch.attention_bias
        self.attention_norm = nnx.data(
            LayerNorm(make, size, **norm) if kind.has_norm else None
        )
        self.qkv = Linear(
            make, "qkv", (3 * size, size), ("heads", "embed"), bias=bias, **drawn_in
        )
        self.o = Linear(
            make, "o", (size, size), ("embed", "heads"), bias=bias, **drawn_out
        )
        self.mlp_norm = LayerNorm(make, size, **norm)
        self.up = Linear(
            make,
            "up",
            (2 * wide, size),
            ("mlp", "embed"),
            bias=arch.mlp_bias,
            **drawn_in,
        )
        self.down = Linear(
            make,
            "down",
            (size, wide),
            ("embed", "mlp"),
            bias=arch.mlp_bias,
            **drawn_out,
        )
        self.arch = arch
        self.kind = kind

    def __call__(
        self, x_BTD: Float[Array, "B T D"], context: Context, rng: Key[Array, ""] | None
    ) -> Float[Array, "B T D"]:
        B, T, _ = x_BTD.shape
        mask, rotation = context[self.kind.is_local]
        normed = x_BTD if self.attention_norm is None else self.attention_norm(x_BTD)
        qkv = self.qkv(normed, rng).reshape(B, T, 3, -1, self.arch.head_dim)
        q, k, v = (qkv[:, :, i] for i in range(3))
        q, k = rope.rotate(q, rotation), rope.rotate(k, rotation)
        rates = self.arch.dropout
        out = attention(
            q,
            k,
            v,
            mask,
            scale=self.arch.head_dim**-0.5,
            dropout=rates.attention,
            rng=own_key(rng, "attention dropout"),
            way=self.way,
        )
        out = self.o(out.reshape(x_BTD.shape), rng)
        key = own_key(rng, "attention output")
        x_BTD = x_BTD + dropout(out, rates.attention_output, key)
        both = self.up(self.mlp_norm(x_BTD), rng)
        gate, up = (
            both.reshape(B, T, 2, -1)[:, :, 0],
            both.reshape(B, T, 2, -1)[:, :, 1],
        )
        hidden = ACTIVATIONS[self.arch.activation](gate) * up
        hidden = dropout(hidden, rates.mlp, own_key(rng, "mlp dropout"))
        x_BTD = x_BTD + self.down(hidden, rng)
        return constrain(x_BTD, "batch", "sequence", None)


class ModernBert(Encoder):
    """An encoder whose layers see a window or all, and that norms last."""

    def __init__(
        self,
        arch: ModernBertArchitecture,
        make: Maker,
        compute_dtype: jax.typing.DTypeLike,
        cuts: tuple[int, ...] = (),
    ):
        super().__init__(arch, make, compute_dtype, cuts)
        self.norm = LayerNorm(
            make, arch.hidden_size, eps=arch.norm_eps, bias=arch.norm_bias
        )

    @staticmethod
    def make_layers(
        arch: ModernBertArchitecture, make: Maker, cuts: tuple[int, ...]
    ) -> Stack:
        """The layers."""
        return Stack(make, lambda make, kind: Block(make, arch, kind), arch.kinds, cuts)

    def backbone(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"],
        *,
        rng: Key[Array, ""] | None = None,
        remat: str = "none",
    ) -> Float[Array, "B T D"]:
        """All layers and the last norm; see `Encoder.backbone`."""
        where = Places(positions_BT, segment_ids_BT)
        lengths = rope.sequence_lengths(segment_ids_BT, positions_BT, segment_ids_BT)
        context = {
            is_local: (
                Mask(
                    where, window=self.arch.window if is_local else None, causal=False
                ),
                rope.rotation(positions_BT, turning, lengths),
            )
            for is_local, turning in self.arch.ropes
        }

        def body(block, x, layer):
            key = None if rng is None else jax.random.fold_in(rng, layer)
            return block(x, context, key)

        return self.norm(self.layers.scan(body, x_BTD, REMAT_POLICIES[remat]))


MODEL = ModernBert


def architecture(fields: Fields) -> ModernBertArchitecture:
    """Reads the config of a `modernbert` checkpoint."""
    # These say how it is computed, and on which tokens a loss is, not what.
    fields.ignore("deterministic_flash_attn", "sparse_prediction")
    fields.ignore("sparse_pred_ignore_index", "cls_token_id", "sep_token_id")
    hidden_size = fields.take("hidden_size")
    num_heads = fields.take("num_attention_heads")
    num_layers = fields.take("num_hidden_layers")
    std = fields.take("initializer_range")
    types = fields.take("layer_types")
    limit = fields.take("max_position_embeddings")
    parameters = fields.take("rope_parameters")
    attention_dropout = fields.take("attention_dropout")
    arch = ModernBertArchitecture(
        base_name="model",
        vocab_size=fields.take("vocab_size"),
        embedding_size=hidden_size,
        hidden_size=hidden_size,
        intermediate_size=fields.take("intermediate_size"),
        num_heads=num_heads,
        num_layers=num_layers,
        activation=fields.choose("hidden_activation", ACTIVATIONS),
        norm_eps=fields.take("norm_eps"),
        norm_bias=fields.take("norm_bias"),
        projection="",
        num_positions=0,
        position_offset=0,
        num_types=0,
        padding_id=None,  # transformers draws its vector like any other
        initializer_range=std,
        cutoff=fields.take("initializer_cutoff_factor"),
        dropout=Dropout(
            embedding=fields.take("embedding_dropout"),
            attention=attention_dropout,
            attention_output=attention_dropout,
            mlp=fields.take("mlp_dropout"),
        ),
        plan=Plan(kind=heads.find(fields.architecture)),
        kinds=tuple(
            Kind(kind == "sliding_attention", layer > 0)
            for layer, kind in enumerate(types)
        ),
        # A tokens sees half of `local_attention` to either side.
        window=fields.take("local_attention") // 2 + 1,
        ropes=tuple(
            (
                kind == "sliding_attention",
                rope.from_config(parameters[kind], hidden_size // num_heads, limit),
            )
            for kind in sorted(set(types))
        ),
        attention_bias=fields.take("attention_bias"),
        mlp_bias=fields.take("mlp_bias"),
        residual_std=std / math.sqrt(2 * num_layers),
    )
    return dataclasses.replace(arch, plan=_plan(arch, fields))


def _plan(arch: ModernBertArchitecture, fields: Fields) -> Plan:
    kind = arch.plan.kind
    tied = fields.take("tie_word_embeddings")
    decoder_bias = fields.take("decoder_bias")
    pooling = fields.choose("classifier_pooling", ("cls", "mean"))
    dense_bias = fields.take("classifier_bias")
    activation = fields.choose("classifier_activation", ACTIVATIONS)
    classifier_dropout = fields.take("classifier_dropout")
    if kind == "base":
        return arch.plan
    if kind == "masked_lm":
        plan = Plan(
            kind=kind,
            num_outputs=arch.vocab_size,
            output_std=arch.residual_std,
        )
        plan = encoder_head.with_outputs(plan, "decoder", tied=tied, bias=decoder_bias)
    else:
        plan = encoder_head.classifier(
            kind,
            "classifier",
            num_labels=fields.num_labels,
            std=arch.hidden_size**-0.5,
            dropout=classifier_dropout,
        )
    if kind == "sequence_classification" and pooling == "mean":
        plan = dataclasses.replace(plan, pooling="mean")
    return dataclasses.replace(
        plan,
        dense="head.dense",
        dense_size=arch.hidden_size,
        dense_bias=dense_bias,
        dense_std=arch.residual_std,
        activation=activation,
        norm="head.norm",
        norm_bias=arch.norm_bias,
        norm_eps=arch.norm_eps,
        cutoff=arch.cutoff,
    )


def rows(arch: ModernBertArchitecture) -> tuple[Row, ...]:
    """Hugging Face's names."""
    linear = {
        "attn.Wqkv": ("qkv", arch.attention_bias),
        "attn.Wo": ("o", arch.attention_bias),
        "mlp.Wi": ("up", arch.mlp_bias),
        "mlp.Wo": ("down", arch.mlp_bias),
    }
    norms = {
        "layers.{}.attn_norm": "layers.{}.attention_norm",
        "layers.{}.mlp_norm": "layers.{}.mlp_norm",
        "embeddings.norm": "embeddings.norm",
        "final_norm": "norm",
    }
    tied = (arch.plan.tied_alias,) if arch.plan.tied_alias else ()
    words = "model.embeddings.tok_embeddings.weight"
    table = [Row(words, "embeddings.words.weight", aliases=tied)]
    for hf, (ours, bias) in linear.items():
        table += linear_rows(
            f"model.layers.{{}}.{hf}", f"layers.{{}}.{ours}", bias=bias
        )
    for hf, ours in norms.items():
        table += norm_rows(f"model.{hf}", ours, bias=arch.norm_bias)
    return named_rows(arch, [*table, *arch.plan.rows()])

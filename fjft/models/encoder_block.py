"""What encoders are made of: their numbers, embeddings, attention, post-norm blocks."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from fjft.models.attention import Attending, attention
from fjft.models.encoder_head import Plan
from fjft.models.layers import (
    ACTIVATIONS,
    Embedding,
    LayerNorm,
    Linear,
    Maker,
    adapted,
    dropout,
    own_key,
)
from fjft.models.prompt import prepend_vectors
from fjft.sharding import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dropout:
    """Shares that are dropped in training, by what they are dropped of.

    Attributes:
      embedding: The normed embeddings.
      attention: The attention probabilities.
      attention_output: What attention adds to the residual stream.
      mlp: What the MLP adds to it; in ModernBERT, what the MLP's last map reads.
    """

    embedding: float
    attention: float
    attention_output: float
    mlp: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """Every number that shapes an encoder's maths; none has a default.

    Attributes:
      base_name: Hugging Face's name of the bare model inside one with a head, `bert`.
      embedding_size: Size of the token vectors.
      projection: Where these become `hidden_size` wide: `before` the norm (and without
        a bias), `after` it, or "" for nowhere.
      num_positions: Rows of the table of positions; 0 is no table.
      position_offset: The row of position 0.
      num_types: Rows of the table of token types; 0 is no table.
      padding_id: The token whose new vector is zero.
      initializer_range: Standard deviation of new weights.
      cutoff: Multiple of the deviation beyond which none lies; None is any.
      plan: The head.
    """

    base_name: str
    vocab_size: int
    embedding_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_layers: int
    activation: str
    norm_eps: float
    norm_bias: bool
    projection: str
    num_positions: int
    position_offset: int
    num_types: int
    padding_id: int | None
    initializer_range: float
    cutoff: float | None
    dropout: Dropout
    plan: Plan

    @property
    def head(self) -> str:
        """The kind of head."""
        return self.plan.kind

    @property
    def head_dim(self) -> int:
        """H."""
        return self.hidden_size // self.num_heads


class Embeddings(nnx.Module):
    """Tokens, positions and types, added and normed."""

    def __init__(self, make: Maker, arch: Architecture):
        size, std = arch.embedding_size, arch.initializer_range
        self.words = Embedding(
            make,
            arch.vocab_size,
            size,
            std=std,
            cutoff=arch.cutoff,
            padding_id=arch.padding_id,
        )
        # Position 0 comes after a row for padding, where there is an offset.
        padding = arch.position_offset - 1 if arch.position_offset else None
        positions = types = project = None
        if arch.num_positions:
            positions = Embedding(
                make,
                arch.num_positions,
                size,
                std=std,
                axis="positions",
                padding_id=padding,
            )
        if arch.num_types:
            types = Embedding(make, arch.num_types, size, std=std, axis="types")
        if arch.projection:
            project = Linear(
                make,
                "project",
                (arch.hidden_size, size),
                ("hidden", "embed"),
                bias=arch.projection == "after",
                std=std,
            )
        self.positions: Embedding | None = nnx.data(positions)
        self.types: Embedding | None = nnx.data(types)
        self.project: Linear | None = nnx.data(project)
        norm_size = arch.hidden_size if arch.projection == "before" else size
        self.norm = LayerNorm(make, norm_size, eps=arch.norm_eps, bias=arch.norm_bias)
        self.arch = arch

    def __call__(
        self,
        input_ids_BT: Int[Array, "B T"],
        positions_BS: Int[Array, "B S"],
        token_type_ids_BS: Int[Array, "B S"] | None,
        dtype: jax.typing.DTypeLike,
        rng: Key[Array, ""] | None,
        virtual_ND: Float[Array, "N E"] | None = None,
    ) -> Float[Array, "B S D"]:
        """What the first layer gets, of virtual and other tokens."""
        arch = self.arch
        x = self.words(input_ids_BT, dtype)
        if virtual_ND is not None:
            x = prepend_vectors(virtual_ND, x)
        if self.types is not None:
            if token_type_ids_BS is None:
                token_type_ids_BS = jnp.zeros_like(positions_BS)
            x = x + self.types(token_type_ids_BS, dtype)
        if self.positions is not None:
            # A position beyond the table becomes NaN, rather than the last one's.
            table = self.positions.weight[...].astype(dtype)
            places = positions_BS + arch.position_offset
            x = x + jnp.take(table, places, axis=0, mode="fill", fill_value=jnp.nan)
        if self.project is not None and arch.projection == "before":
            x = self.project(x, rng)
        key = own_key(rng, "embedding dropout")
        x = dropout(self.norm(x), arch.dropout.embedding, key)
        if self.project is not None and arch.projection == "after":
            x = self.project(x, rng)
        return x


class SelfAttention(Attending):
    """Multi-head attention in both directions (Vaswani et al. 2017)."""

    def __init__(self, make: Maker, arch: Architecture):
        sizes, std = (arch.hidden_size, arch.hidden_size), arch.initializer_range
        self.q, self.k, self.v = (
            Linear(make, name, sizes, ("heads", "embed"), bias=True, std=std)
            for name in "qkv"
        )
        self.o = Linear(make, "o", sizes, ("embed", "heads"), bias=True, std=std)
        self.head_dim = arch.head_dim
        self.dropout = arch.dropout.attention

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        context: Any,
        rng: Key[Array, ""] | None,
    ) -> Float[Array, "B T D"]:
        q, k, v = (self.split(f(x_BTD, rng)) for f in (self.q, self.k, self.v))
        out = attention(
            q,
            k,
            v,
            context,
            scale=self.head_dim**-0.5,
            dropout=self.dropout,
            rng=own_key(rng, "attention dropout"),
            way=self.way,
        )
        return self.o(out.reshape(x_BTD.shape), rng)

    def split(self, x: Float[Array, "*B NH"]) -> Float[Array, "*B N H"]:
        """Cuts vectors into heads."""
        return x.reshape(*x.shape[:-1], -1, self.head_dim)


class Block(nnx.Module):
    """One layer: `x = norm(x + attention(x))`, then `norm(x + mlp(x))`.

    Attributes:
      adapter: None, or what changes the outputs of both sublayers; see `adapted`.
    """

    def __init__(
        self,
        make: Maker,
        arch: Architecture,
        make_attention: Callable[[Maker, Any], Any] = SelfAttention,
    ):
        size, wide, std = (
            arch.hidden_size,
            arch.intermediate_size,
            arch.initializer_range,
        )
        self.attention = make_attention(make, arch)
        self.attention_norm = LayerNorm(make, size, eps=arch.norm_eps, bias=True)
        self.up = Linear(make, "up", (wide, size), ("mlp", "embed"), bias=True, std=std)
        self.down = Linear(
            make, "down", (size, wide), ("embed", "mlp"), bias=True, std=std
        )
        self.mlp_norm = LayerNorm(make, size, eps=arch.norm_eps, bias=True)
        self.adapter: Any = nnx.data(None)
        self.activation = arch.activation
        self.dropout = arch.dropout

    def __call__(
        self, x_BTD: Float[Array, "B T D"], context: Any, rng: Key[Array, ""] | None
    ) -> Float[Array, "B T D"]:
        out, norm = self.attention(x_BTD, context, rng), self.attention_norm
        out = dropout(
            out, self.dropout.attention_output, own_key(rng, "attention output")
        )
        out = adapted(self.adapter, "attention", out, x_BTD, norm, rng)
        x_BTD = norm(x_BTD + out)
        hidden = ACTIVATIONS[self.activation](self.up(x_BTD, rng))
        out, norm = self.down(hidden, rng), self.mlp_norm
        out = dropout(out, self.dropout.mlp, own_key(rng, "mlp output"))
        x_BTD = norm(x_BTD + adapted(self.adapter, "mlp", out, x_BTD, norm, rng))
        return constrain(x_BTD, "batch", "sequence", None)

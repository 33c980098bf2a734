"""The layer of encoder-decoders: self attention, cross attention, MLP, either order."""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from fjft.models.attention import Attending, attention
from fjft.models.cache import Cache
from fjft.models.layers import (
    ACTIVATIONS,
    LayerNorm,
    Linear,
    Maker,
    RMSNorm,
    dropout,
    own_key,
)
from fjft.models.mask import Mask
from fjft.models.prompt import Prefix
from fjft.sharding import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stds:
    """Standard deviations of new weights."""

    embedding: float
    relative_bias: float
    q: float
    kv: float
    o: float
    up: float
    down: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dropout:
    """Shares that are dropped in training, by what they are dropped of."""

    residual: float
    attention: float
    activation: float
    output: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """The numbers of one of the two stacks.

    Attributes:
      attention_scale: What attention scores are multiplied by.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    intermediate_size: int
    attention_scale: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """Every number that shapes the maths; none has a default.

    Attributes:
      vocab_size: Tokens of the encoder.
      decoder_vocab_size: Tokens of the decoder, and logits.
      gated: Whether the MLP has a gate.
      bias: Whether linear maps have biases.
      norm: `rms` or `layer`.
      norm_start: What the weights of new norms are.
      pre_norm: Whether norms stand before attention and MLP, or after them.
      final_norm: Whether there is a norm after each stack.
      embedding_norm: Whether there is one after the embeddings.
      embedding_scale: What token vectors are multiplied by.
      positions: `learned`, `sinusoidal` or `relative`.
      num_positions: Positions that a table holds; 0 is no limit.
      position_offset: The row of a learned table for position 0.
      num_buckets: Rows of the table of relative positions.
      max_distance: The distance from which on all fall into the last bucket.
      shares_embeddings: Whether encoder and decoder have one token table.
      ties_head: Whether the logits are the decoder's token table times hidden states.
      logit_scale: What hidden states are multiplied by for that.
      has_logits_bias: Whether a vector, which is never trained, is added to the logits.
      pad_token_id: The token of padding.
      pads_embedding: Whether its vector starts at zero and learns nothing from being
        looked up.
      start_id: What the decoder reads first; None is a row's own last token.
      prefix: What stands before `encoder.` in Hugging Face's names.
    """

    vocab_size: int
    decoder_vocab_size: int
    hidden_size: int
    encoder: Side
    decoder: Side
    activation: str
    gated: bool
    bias: bool
    norm: str
    norm_eps: float
    norm_start: float
    pre_norm: bool
    final_norm: bool
    embedding_norm: bool
    embedding_scale: float
    positions: str
    num_positions: int
    position_offset: int
    num_buckets: int
    max_distance: int
    shares_embeddings: bool
    ties_head: bool
    logit_scale: float
    has_logits_bias: bool
    pad_token_id: int | None
    pads_embedding: bool
    start_id: int | None
    dropout: Dropout
    stds: Stds
    prefix: str

    @property
    def num_layers(self) -> int:
        """The decoder's, which are those that methods count and cut."""
        return self.decoder.num_layers

    @property
    def head(self) -> str:
        """The kind of head."""
        return "seq2seq_lm"


@dataclasses.dataclass(frozen=True)
class View:
    """What all layers of one pass share.

    Attributes:
      mask: Which tokens of its own stack each token sees.
      bias: What is added to their scores.
      source_mask: Which tokens of the encoder it sees.
      prefix: Virtual keys and values; with a cache they are in there.
    """

    mask: Mask
    bias: Float[Array, "B N T S"] | None
    source_mask: Mask | None
    prefix: Prefix | None


class Attention(Attending):
    """Multi-head attention on the own stack or on the encoder (Vaswani et al. 2017)."""

    def __init__(self, make: Maker, arch: Architecture, side: Side):
        size, heads, stds = (
            arch.hidden_size,
            side.num_heads * side.head_dim,
            arch.stds,
        )
        inward = (heads, size), ("heads", "embed")
        self.q, self.k, self.v = (
            Linear(make, name, *inward, bias=arch.bias, std=std)
            for name, std in (("q", stds.q), ("k", stds.kv), ("v", stds.kv))
        )
        self.o = Linear(
            make, "o", (size, heads), ("embed", "heads"), bias=arch.bias, std=stds.o
        )
        self.side = side
        self.dropout = arch.dropout.attention

    def keys_values(
        self, x_BSD: Float[Array, "B S D"], rng: Key[Array, ""] | None
    ) -> tuple[Float[Array, "B S N H"], Float[Array, "B S N H"]]:
        """What queries see of `x`."""
        return self._split(self.k(x_BSD, rng)), self._split(self.v(x_BSD, rng))

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        keys_values: tuple[Float[Array, "B S N H"], Float[Array, "B S N H"]],
        mask: Mask,
        bias: Float[Array, "B N T S"] | None,
        rng: Key[Array, ""] | None,
    ) -> Float[Array, "B T D"]:
        q = self._split(self.q(x_BTD, rng))
        out = attention(
            q,
            *keys_values,
            mask,
            scale=self.side.attention_scale,
            bias_BNTS=bias,
            dropout=self.dropout,
            rng=own_key(rng, "attention dropout"),
            way=self.way,
        )
        return self.o(out.reshape(*x_BTD.shape[:2], -1), rng)

    def _split(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], -1, self.side.head_dim)


class MLP(nnx.Module):
    """`down(act(up(x)))`, or `down(act(gate(x)) * up(x))`."""

    def __init__(self, make: Maker, arch: Architecture, side: Side):
        wide = (side.intermediate_size, arch.hidden_size), ("mlp", "embed")
        narrow = (arch.hidden_size, side.intermediate_size), ("embed", "mlp")
        bias, stds = arch.bias, arch.stds
        self.up = Linear(make, "up", *wide, bias=bias, std=stds.up)
        self.gate = nnx.data(
            Linear(make, "gate", *wide, bias=bias, std=stds.up) if arch.gated else None
        )
        self.down = Linear(make, "down", *narrow, bias=bias, std=stds.down)
        self.activation = arch.activation
        self.dropout = arch.dropout.activation

    def __call__(
        self, x: Float[Array, "B T D"], rng: Key[Array, ""] | None
    ) -> Float[Array, "B T D"]:
        act = ACTIVATIONS[self.activation]
        if self.gate is None:
            hidden = act(self.up(x, rng))
        else:
            hidden = act(self.gate(x, rng)) * self.up(x, rng)
        return self.down(dropout(hidden, self.dropout, rng), rng)


def make_norm(make: Maker, arch: Architecture) -> nnx.Module:
    """A norm of hidden states as this architecture has them."""
    if arch.norm == "layer":
        return LayerNorm(make, arch.hidden_size, eps=arch.norm_eps, bias=True)
    norm = RMSNorm(make, arch.hidden_size, eps=arch.norm_eps)
    start = jax.nn.initializers.constant(arch.norm_start)
    norm.weight = make((arch.hidden_size,), ("norm",), start)
    return norm


class Block(nnx.Module):
    """One layer of either stack; only the decoder's have cross attention.

    With `arch.pre_norm` each part is `x + f(norm(x))`, otherwise `norm(x + f(x))`.
    """

    def __init__(self, make: Maker, arch: Architecture, side: Side, has_cross: bool):
        self.attention = Attention(make, arch, side)
        self.attention_norm = make_norm(make, arch)
        self.cross = nnx.data(Attention(make, arch, side) if has_cross else None)
        self.cross_norm = nnx.data(make_norm(make, arch) if has_cross else None)
        self.mlp = MLP(make, arch, side)
        self.mlp_norm = make_norm(make, arch)
        self.pre_norm = arch.pre_norm
        self.dropout = arch.dropout.residual

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        view: View,
        layer: Int[Array, ""],
        cache: Cache | None,
        source: Cache | Float[Array, "B E D"] | None,
        rng: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """One layer.

        Args:
          x_BTD: Hidden states.
          view: What is seen.
          layer: The layer's number.
          cache: Keys and values of earlier tokens of the own stack.
          source: The encoder's states, or keys and values made of them already.
          rng: Turns dropout on.
        """
        keys = (None,) * 3 if rng is None else tuple(jax.random.split(rng, 3))
        y = self._before(self.attention_norm, x_BTD)
        kv = self.attention.keys_values(y, keys[0])
        if cache is not None:
            cache = cache.write(layer, *kv)
            kv = cache.layer(layer)
        elif view.prefix is not None:
            kv = view.prefix.prepend(layer, *kv)
        y = self.attention(y, kv, view.mask, view.bias, keys[0])
        x_BTD = self._after(self.attention_norm, x_BTD, y, keys[0])
        if self.cross is not None:
            assert source is not None
            assert view.source_mask is not None
            y = self._before(self.cross_norm, x_BTD)
            if isinstance(source, Cache):
                kv = source.layer(layer)
            else:
                kv = self.cross.keys_values(source, keys[1])
            y = self.cross(y, kv, view.source_mask, None, keys[1])
            x_BTD = self._after(self.cross_norm, x_BTD, y, keys[1])
        y = self.mlp(self._before(self.mlp_norm, x_BTD), keys[2])
        x_BTD = self._after(self.mlp_norm, x_BTD, y, keys[2])
        return constrain(x_BTD, "batch", "sequence", None), cache

    def _before(self, norm: Any, x: jax.Array) -> jax.Array:
        return norm(x) if self.pre_norm else x

    def _after(
        self, norm: Any, x: jax.Array, y: jax.Array, rng: jax.Array | None
    ) -> jax.Array:
        if rng is not None:
            rng = jax.random.fold_in(rng, 1)
        x = x + dropout(y, self.dropout, rng)
        return x if self.pre_norm else norm(x)

"""The layer that decoders are made of, and the numbers and flags that shape it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from fjft.models.attention import Attending, attention
from fjft.models.cache import Cache
from fjft.models.layers import (
    ACTIVATIONS,
    GatedMLP,
    LayerNorm,
    Linear,
    Maker,
    RMSNorm,
    adapted,
    dropout,
)
from fjft.models.mask import Mask
from fjft.models.moe import Experts, Load, SparseMLP
from fjft.models.prompt import Prefix
from fjft.models.rope import Rope, Rotation, rotate
from fjft.sharding import constrain

DROPOUT_STREAM = 1  # folded into a layer's key; linear maps fold in their names


@dataclasses.dataclass(frozen=True)
class Kind:
    """What the compiler must know of one layer; layers of one kind share a program.

    Attributes:
      window: The tokens it sees back, its own included; None is all.
      rope: How positions turn queries and keys; None is not at all.
      is_sparse: Whether it has routed experts in the place of its MLP.
    """

    window: int | None = None
    rope: Rope | None = None
    is_sparse: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """What shapes a decoder's maths. Numbers have no default; forms have Llama's.

    Attributes:
      kinds: Of each layer, in order.
      attention_scale: What attention scores are multiplied by.
      initializer_range: Standard deviation of newly made weights.
      norm: `rms`, `rms_wide` (rounds once, after the weight), `rms_plus_one` (the same,
        and stores the weight less one) or `layer`.
      pre_norm: Whether attention and MLP read the residual stream through a norm.
      post_norm: Whether they write to it through a norm.
      is_parallel: Whether the MLP reads what attention reads, not what it has written.
      qkv: `split`: three maps; `fused`: one, all queries before all keys and values;
        `fused_by_head`: one, each head's query, key and value together.
      qk_norm: `head` norms each head's queries and keys, `width` all of them at once.
      mlp: `gated`, `gated_fused` (gate and up are one map) or `plain`.
      scale_by_layer: Whether layer n divides its scores by n, counted from 1.
      residual_std: Like `initializer_range`, of the maps into the residual stream.
      attention_softcap: Bends attention scores into (-softcap, softcap).
      logit_softcap: Bends logits likewise.
      embedding_scale: What token vectors are multiplied by.
      num_positions: Learned position vectors; None has none.
      num_labels: Outputs of a head for whole texts, which then stands in the place of
        the logits of tokens; None has those.
      experts: The routed experts of sparse layers.
      residual_dropout: Share dropped of what is written to the residual stream.
      embedding_dropout: Share dropped of the embeddings.
      attention_dropout: Share dropped of the attention probabilities.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    kinds: tuple[Kind, ...]
    activation: str
    norm_eps: float
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    attention_scale: float
    attention_dropout: float
    tie_word_embeddings: bool
    initializer_range: float
    padding_id: int | None
    norm: str = "rms"
    pre_norm: bool = True
    post_norm: bool = False
    is_parallel: bool = False
    qkv: str = "split"
    qk_norm: str | None = None
    mlp: str = "gated"
    scale_by_layer: bool = False
    residual_std: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float | None = None
    num_positions: int | None = None
    num_labels: int | None = None
    experts: Experts | None = None
    residual_dropout: float = 0.0
    embedding_dropout: float = 0.0

    @property
    def head(self) -> str:
        """A key of `heads.HEADS`' values."""
        return "causal_lm" if self.num_labels is None else "sequence_classification"

    @property
    def base_name(self) -> str | None:
        """What names of the parts below other heads begin with, where there are any."""
        return None if self.num_labels is None else "model"

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.kinds)

    @property
    def out_std(self) -> float:
        """Standard deviation of new maps into the residual stream."""
        std = self.residual_std
        return self.initializer_range if std is None else std


@dataclasses.dataclass(frozen=True)
class View:
    """What all layers of one pass share, worked out once for each kind.

    Attributes:
      masks: By window, which keys each query sees.
      rotations: By rope, the rotation of the new tokens.
      is_real: Which of the new tokens are not padding, Bool[B, T].
      prefix: Virtual keys and values; with a cache they are in there.
    """

    masks: dict[int | None, Mask]
    rotations: dict[Rope, Rotation]
    is_real: Bool[Array, "B T"]
    prefix: Prefix | None


def make_norm(make: Maker, arch: Architecture, size: int) -> nnx.Module:
    """A norm as this architecture has them."""
    if arch.norm == "layer":
        return LayerNorm(make, size, eps=arch.norm_eps, bias=True)
    offset = {"rms": None, "rms_wide": 0.0, "rms_plus_one": 1.0}[arch.norm]
    return RMSNorm(make, size, eps=arch.norm_eps, offset=offset)


class Attention(Attending):
    """Grouped-query attention with RoPE (Ainslie et al. 2023; Su et al. 2021)."""

    def __init__(self, make: Maker, arch: Architecture, kind: Kind):
        size, std, bias = arch.hidden_size, arch.initializer_range, arch.qkv_bias
        heads, kv_heads = (
            n * arch.head_dim for n in (arch.num_heads, arch.num_kv_heads)
        )

        def linear(name: str, num_out: int, axis: str) -> Linear:
            return Linear(
                make, name, (num_out, size), (axis, "embed"), bias=bias, std=std
            )

        if arch.qkv == "split":
            self.q = linear("q", heads, "heads")
            self.k = linear("k", kv_heads, "kv_heads")
            self.v = linear("v", kv_heads, "kv_heads")
        else:
            self.qkv = linear("qkv", heads + 2 * kv_heads, "heads")
        self.o = Linear(
            make,
            "o",
            (size, heads),
            ("embed", "heads"),
            bias=arch.o_bias,
            std=arch.out_std,
        )
        sizes = {None: (None, None), "head": (arch.head_dim,) * 2}
        sizes["width"] = heads, kv_heads
        norms: Any = tuple(
            nnx.data(None if n is None else make_norm(make, arch, n))
            for n in sizes[arch.qk_norm]
        )
        self.q_norm, self.k_norm = norms
        self.layout = arch.qkv
        self.norms_heads = arch.qk_norm == "head"
        self.num_heads, self.num_kv_heads = arch.num_heads, arch.num_kv_heads
        self.head_dim = arch.head_dim
        self.scale, self.softcap = arch.attention_scale, arch.attention_softcap
        self.scale_by_layer = arch.scale_by_layer
        self.dropout = arch.attention_dropout
        self.kind = kind

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        view: View,
        layer: Int[Array, ""],
        cache: Cache | None,
        rng: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        q, k, v = self._project(x_BTD, rng)
        if self.kind.rope is not None:
            rotation = view.rotations[self.kind.rope]
            q, k = rotate(q, rotation), rotate(k, rotation)
        if self.scale_by_layer:
            q = q / (layer + 1).astype(q.dtype)
        if cache is not None:
            cache = cache.write(layer, k, v)
            k, v = cache.layer(layer)
        elif view.prefix is not None:
            k, v = view.prefix.prepend(layer, k, v)
        out = attention(
            q,
            k,
            v,
            view.masks[self.kind.window],
            scale=self.scale,
            softcap=self.softcap,
            dropout=self.dropout,
            rng=None if rng is None else jax.random.fold_in(rng, DROPOUT_STREAM),
            way=self.way,
        )
        return self.o(out.reshape(*x_BTD.shape[:2], -1), rng), cache

    def _project(
        self, x_BTD: jax.Array, rng: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, N, H], keys and values [B, T, K, H], before rotation."""
        if self.layout == "split":
            q, k, v = (f(x_BTD, rng) for f in (self.q, self.k, self.v))
        elif self.layout == "fused":
            ends = self.num_heads, self.num_heads + self.num_kv_heads
            q, k, v = jnp.split(
                self.qkv(x_BTD, rng), [n * self.head_dim for n in ends], axis=-1
            )
        else:
            by_head = self.qkv(x_BTD, rng).reshape(*x_BTD.shape[:2], self.num_heads, -1)
            q, k, v = jnp.split(by_head, 3, axis=-1)
        if self.q_norm is not None and not self.norms_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.reshape(*x_BTD.shape[:2], -1, self.head_dim) for y in (q, k, v))
        if self.q_norm is not None and self.norms_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v


class PlainMLP(nnx.Module):
    """`down(act(up(x)))`."""

    def __init__(self, make: Maker, arch: Architecture):
        size, width, bias = arch.hidden_size, arch.intermediate_size, arch.mlp_bias
        std, out_std = arch.initializer_range, arch.out_std
        widen = (width, size), ("mlp", "embed")
        narrow = (size, width), ("embed", "mlp")
        self.up = Linear(make, "up", *widen, bias=bias, std=std)
        self.down = Linear(make, "down", *narrow, bias=bias, std=out_std)
        self.activation = arch.activation

    def __call__(
        self, x: Float[Array, "B T D"], rng: Key[Array, ""] | None = None
    ) -> Float[Array, "B T D"]:
        return self.down(ACTIVATIONS[self.activation](self.up(x, rng)), rng)


class FusedMLP(nnx.Module):
    """As `GatedMLP`, with one map for gate and up."""

    def __init__(self, make: Maker, arch: Architecture):
        size, width, bias = arch.hidden_size, arch.intermediate_size, arch.mlp_bias
        std, out_std = arch.initializer_range, arch.out_std
        widen = (2 * width, size), ("mlp", "embed")
        narrow = (size, width), ("embed", "mlp")
        self.gate_up = Linear(make, "gate_up", *widen, bias=bias, std=std)
        self.down = Linear(make, "down", *narrow, bias=bias, std=out_std)
        self.activation = arch.activation

    def __call__(
        self, x: Float[Array, "B T D"], rng: Key[Array, ""] | None = None
    ) -> Float[Array, "B T D"]:
        gate, up = jnp.split(self.gate_up(x, rng), 2, axis=-1)
        return self.down(ACTIVATIONS[self.activation](gate) * up, rng)


def _make_mlp(make: Maker, arch: Architecture) -> nnx.Module:
    if arch.mlp != "gated":
        return {"plain": PlainMLP, "gated_fused": FusedMLP}[arch.mlp](make, arch)
    return GatedMLP(
        make,
        arch.hidden_size,
        arch.intermediate_size,
        activation=arch.activation,
        bias=arch.mlp_bias,
        std=arch.initializer_range,
    )


class Block(nnx.Module):
    """One layer: `x + attention(norm(x))`, then `x + mlp(norm(x))`, or as flags say.

    Attributes:
      adapter: None, or what changes the outputs of both sublayers; see `adapted`.
    """

    def __init__(self, make: Maker, arch: Architecture, kind: Kind):
        def norm(wanted: bool) -> Any:
            return nnx.data(make_norm(make, arch, arch.hidden_size) if wanted else None)

        self.attention_norm = norm(arch.pre_norm)
        self.attention = Attention(make, arch, kind)
        self.attention_post_norm = norm(arch.post_norm)
        self.mlp_norm = norm(arch.pre_norm)
        mlp = moe = None
        if kind.is_sparse and arch.experts is not None:
            moe = SparseMLP(
                make,
                arch.hidden_size,
                arch.experts,
                arch.activation,
                std=arch.initializer_range,
            )
        else:
            mlp = _make_mlp(make, arch)
        self.mlp: Any = nnx.data(mlp)
        self.moe: Any = nnx.data(moe)
        self.mlp_post_norm = norm(arch.post_norm)
        self.adapter: Any = nnx.data(None)
        self.is_parallel = arch.is_parallel
        self.dropout = arch.residual_dropout

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        view: View,
        layer: Int[Array, ""],
        cache: Cache | None,
        rng: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "B T D"], Cache | None, Load | None]:
        """What comes out, the cache with this layer's keys, the load of its experts."""
        keys = (None, None) if rng is None else jax.random.split(rng)
        load = None
        attended, cache = self.attention(
            _through(self.attention_norm, x_BTD), view, layer, cache, rng
        )
        attended = _through(self.attention_post_norm, attended)
        attended = adapted(self.adapter, "attention", attended, x_BTD, None, rng)
        between = x_BTD + dropout(attended, self.dropout, keys[0])
        mlp_in = _through(self.mlp_norm, x_BTD if self.is_parallel else between)
        if self.moe is not None:
            out, load = self.moe(mlp_in, view.is_real, rng)
        else:
            out = self.mlp(mlp_in, rng)
        out = _through(self.mlp_post_norm, out)
        out = adapted(self.adapter, "mlp", out, between, None, rng)
        x_BTD = between + dropout(out, self.dropout, keys[1])
        return constrain(x_BTD, "batch", "sequence", None), cache, load


def _through(norm: Any, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)

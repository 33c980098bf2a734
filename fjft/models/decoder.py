"""The decoder that Llama-like families share: pre-norm blocks, RoPE, grouped heads."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from fjft.models import rope
from fjft.models.attention import attention, attention_mask
from fjft.models.cache import Cache, init_cache
from fjft.models.layers import (
    REMAT_POLICIES,
    Embedding,
    GatedMLP,
    Linear,
    Maker,
    RMSNorm,
    Stack,
)
from fjft.models.weights import Row
from fjft.sharding import constrain

Rotation = tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """Every number that shapes the decoder's maths; none has a default.

    Attributes:
      windows: For each layer, the tokens it sees back, its own included; None is all.
      frequencies: RoPE's angle per position of each pair of dimensions.
      qk_norm: Whether queries and keys are normed per head before RoPE.
      initializer_range: Standard deviation of newly made weights.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    frequencies: rope.Frequencies
    activation: str
    rms_norm_eps: float
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    initializer_range: float

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.windows)


class Attention(nnx.Module):
    """Grouped-query attention with RoPE (Ainslie et al. 2023; Su et al. 2021)."""

    def __init__(self, make: Maker, arch: Architecture):
        size, head_dim, std = arch.hidden_size, arch.head_dim, arch.initializer_range
        heads, kv_heads = arch.num_heads * head_dim, arch.num_kv_heads * head_dim
        kv = (kv_heads, size), ("kv_heads", "embed")
        bias = arch.qkv_bias
        self.q = Linear(
            make, "q", (heads, size), ("heads", "embed"), bias=bias, std=std
        )
        self.k = Linear(make, "k", *kv, bias=bias, std=std)
        self.v = Linear(make, "v", *kv, bias=bias, std=std)
        self.o = Linear(
            make, "o", (size, heads), ("embed", "heads"), bias=arch.o_bias, std=std
        )
        self.q_norm, self.k_norm = (
            nnx.data(
                RMSNorm(make, head_dim, eps=arch.rms_norm_eps) if arch.qk_norm else None
            )
            for _ in range(2)
        )
        self.head_dim = head_dim

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        rotation: Rotation,
        mask: Bool[Array, "B T S"],
        layer: Int[Array, ""],
        cache: Cache | None,
        rng: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        B, T, _ = x_BTD.shape
        q, k, v = (
            f(x_BTD, rng).reshape(B, T, -1, self.head_dim)
            for f in (self.q, self.k, self.v)
        )
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rope.rotate(q, rotation), rope.rotate(k, rotation)
        if cache is not None:
            cache = cache.write(layer, k, v)
            k, v = cache.layer(layer)
        out = attention(q, k, v, mask, scale=self.head_dim**-0.5)
        return self.o(out.reshape(B, T, -1), rng), cache


class Block(nnx.Module):
    """One layer: `x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, make: Maker, arch: Architecture, window: int | None):
        self.attention_norm = RMSNorm(make, arch.hidden_size, eps=arch.rms_norm_eps)
        self.attention = Attention(make, arch)
        self.mlp_norm = RMSNorm(make, arch.hidden_size, eps=arch.rms_norm_eps)
        self.mlp = GatedMLP(
            make,
            arch.hidden_size,
            arch.intermediate_size,
            activation=arch.activation,
            bias=arch.mlp_bias,
            std=arch.initializer_range,
        )
        self.window = window

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        rotation: Rotation,
        masks: dict[int | None, Bool[Array, "B T S"]],
        layer: Int[Array, ""],
        cache: Cache | None,
        rng: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        attended, cache = self.attention(
            self.attention_norm(x_BTD), rotation, masks[self.window], layer, cache, rng
        )
        x_BTD = x_BTD + attended
        x_BTD = x_BTD + self.mlp(self.mlp_norm(x_BTD), rng)
        return constrain(x_BTD, "batch", None, None), cache


class Decoder(nnx.Module):
    """A causal language model.

    `model(input_ids)` gives logits; training and decoding call its three parts:
    `embed`, `backbone`, `unembed`.

    Attributes:
      arch: The numbers it was built from.
      provenance: Where its weights came from, set by whoever loads them.
      compute_dtype: Type of the activations; weights are cast to it where used.
    """

    def __init__(
        self,
        arch: Architecture,
        make: Maker,
        compute_dtype: jax.typing.DTypeLike,
        cuts: tuple[int, ...] = (),
    ):
        std = arch.initializer_range
        vocab = arch.vocab_size, arch.hidden_size
        self.embedding = Embedding(make, *vocab, std=std)
        self.layers = Stack(
            make, lambda make, window: Block(make, arch, window), arch.windows, cuts
        )
        self.norm = RMSNorm(make, arch.hidden_size, eps=arch.rms_norm_eps)
        self.lm_head = nnx.data(
            None
            if arch.tie_word_embeddings
            else Linear(make, "lm_head", vocab, ("vocab", "embed"), bias=False, std=std)
        )
        self.arch = arch
        self.compute_dtype = jnp.dtype(compute_dtype)
        self.provenance: Any = None

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of the next token.

        Args:
          input_ids: Tokens.
          positions: 0, 1, 2, ... in each row when None; restart in every segment.
          segment_ids: All 1 when None; 0 is padding, and segments do not see each
            other.
        """
        segments = jnp.ones_like(input_ids) if segment_ids is None else segment_ids
        if positions is None:
            positions = jnp.broadcast_to(
                jnp.arange(input_ids.shape[1], dtype=jnp.int32)[None], input_ids.shape
            )
        x_BTD = self.embed(input_ids)
        x_BTD, _ = self.backbone(x_BTD, positions, segments)
        return self.unembed(x_BTD)

    @property
    def config(self) -> Any:
        """The Hugging Face config of the checkpoint it was loaded from."""
        return self.provenance.files.config

    def embed(self, input_ids_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token vectors, in the compute dtype."""
        x_BTD = self.embedding(input_ids_BT, self.compute_dtype)
        return constrain(x_BTD, "batch", None, None)

    def backbone(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"],
        *,
        cache: Cache | None = None,
        rng: Key[Array, ""] | None = None,
        remat: str = "none",
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """All layers and the last norm.

        Args:
          x_BTD: Token vectors.
          positions_BT: Positions; restart in every segment.
          segment_ids_BT: Segments; 0 is padding.
          cache: Keys and values of earlier tokens, which these tokens see and join.
          rng: Turns dropout on where there is any.
          remat: What the backward pass recomputes, a key of `REMAT_POLICIES`.
        """
        kv_positions, kv_segments = positions_BT, segment_ids_BT
        if cache is not None:
            cache = cache.reserve(positions_BT, segment_ids_BT)
            kv_positions, kv_segments = cache.positions, cache.segment_ids
        masks = {
            window: attention_mask(
                positions_BT, segment_ids_BT, kv_positions, kv_segments, window=window
            )
            for window in dict.fromkeys(self.arch.windows)
        }
        rotation = rope.rotation(positions_BT, self.arch.frequencies)

        def body(block, carry, layer):
            x, cache = carry
            key = None if rng is None else jax.random.fold_in(rng, layer)
            return block(x, rotation, masks, layer, cache, key)

        x_BTD, cache = self.layers.scan(body, (x_BTD, cache), REMAT_POLICIES[remat])
        if cache is not None:
            cache = cache.advance(positions_BT.shape[1])
        return self.norm(x_BTD), cache

    def unembed(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits, in the compute dtype."""
        if self.lm_head is not None:
            return self.lm_head(x_BTD)
        weight_VD = self.embedding.weight[...].astype(x_BTD.dtype)
        return jnp.einsum("BTD,VD->BTV", x_BTD, weight_VD)

    @property
    def unembedding(self) -> Float[Array, "V D"]:
        """The matrix that turns hidden states into logits."""
        table = self.embedding if self.lm_head is None else self.lm_head
        return table.weight[...]

    def init_cache(self, batch_size: int, num_slots: int) -> Cache:
        """An empty cache for this model, in the compute dtype."""
        arch = self.arch
        return init_cache(
            arch.num_layers,
            batch_size,
            num_slots,
            arch.num_kv_heads,
            arch.head_dim,
            self.compute_dtype,
        )


def rows(arch: Architecture) -> tuple[Row, ...]:
    """Hugging Face's names, as Llama, Mistral and Qwen share them."""
    linear = {
        "self_attn.q_proj": ("attention.q", arch.qkv_bias),
        "self_attn.k_proj": ("attention.k", arch.qkv_bias),
        "self_attn.v_proj": ("attention.v", arch.qkv_bias),
        "self_attn.o_proj": ("attention.o", arch.o_bias),
        "mlp.gate_proj": ("mlp.gate", arch.mlp_bias),
        "mlp.up_proj": ("mlp.up", arch.mlp_bias),
        "mlp.down_proj": ("mlp.down", arch.mlp_bias),
    }
    norms = {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "mlp_norm",
    }
    if arch.qk_norm:
        norms |= {
            "self_attn.q_norm": "attention.q_norm",
            "self_attn.k_norm": "attention.k_norm",
        }
    # A tied head may be stored besides the embedding it is tied to.
    tied = ("lm_head.weight",) if arch.tie_word_embeddings else ()
    table = [
        Row("model.embed_tokens.weight", "embedding.weight", aliases=tied),
        Row("model.norm.weight", "norm.weight"),
    ]
    if not arch.tie_word_embeddings:
        table.append(Row("lm_head.weight", "lm_head.weight"))
    for hf, ours in norms.items():
        table.append(
            Row(f"model.layers.{{}}.{hf}.weight", f"layers.{{}}.{ours}.weight")
        )
    for hf, (ours, bias) in linear.items():
        for leaf in ("weight", "bias") if bias else ("weight",):
            table.append(
                Row(f"model.layers.{{}}.{hf}.{leaf}", f"layers.{{}}.{ours}.{leaf}")
            )
    return tuple(table)

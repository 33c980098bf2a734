"""DeBERTa's layers: attention that tells what a token is from where it is.

Attention scores are sums: content to content, content to position and position to
content, where positions are relative and, far away, counted in buckets that grow
(He et al. 2021, section 3.1).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from fjft.models.attention import attention
from fjft.models.encoder_block import Architecture, Block, SelfAttention
from fjft.models.layers import (
    ACTIVATIONS,
    LayerNorm,
    Linear,
    Maker,
    dropout,
    normal,
    own_key,
)
from fjft.models.mask import Mask


@dataclasses.dataclass(frozen=True, kw_only=True)
class DebertaArchitecture(Architecture):
    """What DeBERTa has besides.

    Attributes:
      relative: Whether relative positions take part in attention.
      terms: Which of `c2p` (content to position) and `p2c` do.
      span: Relative positions from -span to span - 1 have a vector.
      buckets: Buckets of relative positions; 0 or less counts each one.
      max_distance: The distance that the last bucket reaches to.
      share_keys: Whether positions go through the maps of the content.
      norm_positions: Whether the vectors of relative positions are normed.
      conv_size: Tokens that the convolution beside the first layer sees; 0 is none.
      conv_groups: Groups of channels that it keeps apart.
      conv_activation: A key of `ACTIVATIONS`.
      hidden_dropout: Share that training drops of the vectors of relative positions,
        and of what the convolution gives.
    """

    relative: bool
    terms: tuple[str, ...]
    span: int
    buckets: int
    max_distance: int
    share_keys: bool
    norm_positions: bool
    conv_size: int
    conv_groups: int
    conv_activation: str
    hidden_dropout: float


Context = tuple[Mask, Float[Array, "R D"] | None]


class DisentangledAttention(SelfAttention):
    """Attention with relative positions (He et al. 2021, equation 4)."""

    def __init__(self, make: Maker, arch: DebertaArchitecture):
        super().__init__(make, arch)
        own = arch.relative and not arch.share_keys
        sizes, std = (arch.hidden_size, arch.hidden_size), arch.initializer_range
        self.position_k, self.position_q = (
            nnx.data(
                Linear(make, name, sizes, ("heads", "embed"), bias=True, std=std)
                if own and term in arch.terms
                else None
            )
            for name, term in (("position_k", "c2p"), ("position_q", "p2c"))
        )
        self.arch = arch

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        context: Context,
        rng: Key[Array, ""] | None,
    ) -> Float[Array, "B T D"]:
        mask, positions_RD = context
        q, k, v = (self.split(f(x_BTD, rng)) for f in (self.q, self.k, self.v))
        scale = (self.head_dim * (1 + len(self.arch.terms))) ** -0.5
        bias = None
        if positions_RD is not None and self.arch.terms:
            key = own_key(rng, "position dropout")
            positions_RD = dropout(positions_RD, self.arch.hidden_dropout, key)
            bias = self.position_scores(q, k, positions_RD, rng) * scale
        out = attention(
            q,
            k,
            v,
            mask,
            scale=scale,
            bias_BNTS=bias,
            dropout=self.dropout,
            rng=own_key(rng, "attention dropout"),
            way=self.way,
        )
        return self.o(out.reshape(x_BTD.shape), rng)

    def position_scores(
        self,
        q_BTNH: Float[Array, "B T N H"],
        k_BTNH: Float[Array, "B T N H"],
        positions_RD: Float[Array, "R D"],
        rng: Key[Array, ""] | None,
    ) -> Float[Array, "B N T T"]:
        """Content to position and position to content, not scaled."""
        arch, T = self.arch, q_BTNH.shape[1]
        buckets = relative_buckets(T, arch.buckets, arch.max_distance)
        # [T, S]: the vector of the distance from key to query.
        row_TS = np.clip(buckets + arch.span, 0, 2 * arch.span - 1)
        wanted = jnp.asarray(row_TS, jnp.int32)[None, None]
        terms = []
        if "c2p" in arch.terms:
            to_k = self.k if self.position_k is None else self.position_k
            key_RNH = self.split(to_k(positions_RD, rng))
            scores_BNTR = jnp.einsum("BTNH,RNH->BNTR", q_BTNH, key_RNH)
            terms.append(jnp.take_along_axis(scores_BNTR, wanted, axis=-1))
        if "p2c" in arch.terms:
            to_q = self.q if self.position_q is None else self.position_q
            query_RNH = self.split(to_q(positions_RD, rng))
            scores_BNSR = jnp.einsum("BSNH,RNH->BNSR", k_BTNH, query_RNH)
            by_key = wanted.swapaxes(-1, -2)
            picked_BNST = jnp.take_along_axis(scores_BNSR, by_key, axis=-1)
            terms.append(picked_BNST.swapaxes(-1, -2))
        return sum(terms[1:], terms[0])


def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of each query's distance to each key, int [T, S].

    Distances up to half the buckets are their own; the others are spread over the
    rest by their logarithm, up to `max_distance`. float32, as the reference counts.
    """
    distance = np.arange(length)[:, None] - np.arange(length)[None, :]
    if buckets <= 0 or max_distance <= 0:
        return distance
    middle = buckets // 2
    size = np.maximum(np.abs(distance), middle - 1)
    ratio = np.log((size / middle).astype(np.float32))
    whole = np.log(np.float32((max_distance - 1) / middle))
    far = np.ceil(ratio / whole * np.float32(middle - 1)) + middle
    return np.where(size <= middle, distance, far * np.sign(distance)).astype(np.int64)


class Convolution(nnx.Module):
    """What v2 adds to the first layer's output: neighbours' embeddings, convolved."""

    def __init__(self, make: Maker, arch: DebertaArchitecture):
        size = arch.hidden_size
        self.weight = make(
            (size, size // arch.conv_groups, arch.conv_size),
            ("hidden", None, None),
            normal(arch.initializer_range),
        )
        self.bias = make((size,), ("hidden",), jax.nn.initializers.zeros)
        self.norm = LayerNorm(make, size, eps=arch.norm_eps, bias=True)
        self.arch = arch

    def __call__(
        self,
        embedded_BTD: Float[Array, "B T D"],
        x_BTD: Float[Array, "B T D"],
        segment_ids_BT: Int[Array, "B T"],
        rng: Key[Array, ""] | None,
    ) -> Float[Array, "B T D"]:
        B, T, D = embedded_BTD.shape
        groups, width = self.arch.conv_groups, self.arch.conv_size
        before = (width - 1) // 2
        pad = (before, width - 1 - before)
        padded = jnp.pad(embedded_BTD, ((0, 0), pad, (0, 0)))
        segments = jnp.pad(segment_ids_BT, ((0, 0), pad))
        # A neighbour in another segment counts as one beyond the edge: zero.
        taps = [
            jnp.where(
                (segments[:, k : k + T] == segment_ids_BT)[..., None],
                padded[:, k : k + T],
                0,
            )
            for k in range(width)
        ]
        taps_BTgik = jnp.stack(taps, -1).reshape(B, T, groups, D // groups, width)
        weight = self.weight[...].astype(x_BTD.dtype)
        weight_goik = weight.reshape(groups, D // groups, D // groups, width)
        y = jnp.einsum("BTgik,goik->BTgo", taps_BTgik, weight_goik).reshape(B, T, D)
        y = y + self.bias[...].astype(y.dtype)[None, None]
        y = jnp.where((segment_ids_BT != 0)[..., None], y, 0)
        y = dropout(y, self.arch.hidden_dropout, own_key(rng, "convolution"))
        return self.norm(x_BTD + ACTIVATIONS[self.arch.conv_activation](y))


class DebertaBlock(Block):
    """One layer.

    Attributes:
      has_conv: Whether the convolution joins its output.
    """

    def __init__(self, make: Maker, arch: DebertaArchitecture, has_conv: bool):
        super().__init__(make, arch, DisentangledAttention)
        self.has_conv = has_conv

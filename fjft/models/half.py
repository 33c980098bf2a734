"""The halves of encoder-decoders, what one tells the other, and the cache."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from fjft.errors import UserError
from fjft.models.cache import Cache
from fjft.models.cross_block import Architecture, Block, View, make_norm
from fjft.models.layers import Embedding, Maker, dropout
from fjft.models.mask import Mask, Places
from fjft.models.positions import RelativeBias, sinusoids
from fjft.models.prompt import Prefix, with_virtual_places
from fjft.models.stack import REMAT_POLICIES, Stack


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """What the encoder made of its tokens, for the decoder to look at.

    Attributes:
      states: Float[B, E, D].
      segment_ids: Int32[B, E]; the decoder's segment n sees those of segment n.
    """

    states: Float[Array, "B E D"]
    segment_ids: Int[Array, "B E"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncoderDecoderCache:
    """Keys and values of the decoder's tokens so far, and of all the encoder's.

    Attributes:
      tokens: The decoder's own.
      source: The encoder's, worked out once.
    """

    tokens: Cache
    source: Cache


class Half(nnx.Module):
    """One of the two stacks, with what stands before and after its layers."""

    def __init__(
        self,
        make: Maker,
        arch: Architecture,
        *,
        is_decoder: bool,
        cuts: tuple[int, ...] = (),
    ):
        side = arch.decoder if is_decoder else arch.encoder
        positions = relative = None
        if arch.positions == "learned":
            rows = arch.num_positions + arch.position_offset
            std = arch.stds.embedding
            positions = Embedding(
                make, rows, arch.hidden_size, std=std, axis="positions"
            )
        if arch.positions == "relative":
            relative = RelativeBias(
                make,
                arch.num_buckets,
                side.num_heads,
                max_distance=arch.max_distance,
                bidirectional=not is_decoder,
                std=arch.stds.relative_bias,
            )
        self.positions, self.relative_bias = nnx.data(positions), nnx.data(relative)
        self.embedding_norm = nnx.data(
            make_norm(make, arch) if arch.embedding_norm else None
        )
        self.layers = Stack(
            make,
            lambda make, _: Block(make, arch, side, has_cross=is_decoder),
            (None,) * side.num_layers,
            cuts,
        )
        self.norm = nnx.data(make_norm(make, arch) if arch.final_norm else None)
        self.is_decoder = is_decoder
        self.arch = arch

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"],
        memory: Memory | None,
        cache: EncoderDecoderCache | None,
        rng: Key[Array, ""] | None,
        remat: str,
        prefix: Prefix | None = None,
    ) -> tuple[Float[Array, "B T D"], EncoderDecoderCache | None]:
        """Token vectors in, hidden states out; see `EncoderDecoder.backbone`."""
        rates = self.arch.dropout
        keys: Any = (None,) * 3 if rng is None else tuple(jax.random.split(rng, 3))
        tokens = None if cache is None else cache.tokens
        if tokens is not None:
            tokens = tokens.reserve(positions_BT, segment_ids_BT)
        view = self._view(positions_BT, segment_ids_BT, memory, cache, tokens, prefix)
        source = memory.states if memory is not None else cache and cache.source
        if self.arch.positions != "relative":
            x_BTD = x_BTD + self._position_vectors(positions_BT, x_BTD.dtype)
        if self.embedding_norm is not None:
            x_BTD = self.embedding_norm(x_BTD)
        x_BTD = dropout(x_BTD, rates.residual, keys[0])

        def body(block, carry, layer):
            x, tokens = carry
            key = None if rng is None else jax.random.fold_in(keys[1], layer)
            return block(x, view, layer, tokens, source, key)

        x_BTD, tokens = self.layers.scan(
            body,
            (x_BTD, tokens),
            REMAT_POLICIES[remat],
            forward_only=cache is not None,
        )
        if cache is not None:
            tokens = tokens.advance(positions_BT.shape[1])
            cache = dataclasses.replace(cache, tokens=tokens)
        if self.norm is not None:
            x_BTD = self.norm(x_BTD)
        return dropout(x_BTD, rates.output, keys[2]), cache

    def _view(
        self,
        positions: jax.Array,
        segments: jax.Array,
        memory: Memory | None,
        cache: EncoderDecoderCache | None,
        tokens: Cache | None,
        prefix: Prefix | None,
    ) -> View:
        queries, keys = Places(positions, segments), None
        if tokens is not None:
            keys = Places(tokens.positions, tokens.segment_ids)
        elif prefix is not None:
            keys = Places(*with_virtual_places(prefix.num_tokens, positions, segments))
        mask = Mask(queries, keys, causal=self.is_decoder)
        bias = source_mask = None
        if self.relative_bias is not None:
            seen = queries if keys is None else keys
            bias = self.relative_bias(positions, seen.positions)
        if self.is_decoder:
            seen = memory or (cache and cache.source)
            if seen is None:
                raise UserError("the decoder needs what it decodes: memory= or cache=")
            source = Places(seen.segment_ids, seen.segment_ids)
            source_mask = Mask(queries, source, causal=False)
        return View(mask, bias, source_mask, prefix)

    def _position_vectors(
        self, positions_BT: jax.Array, dtype: jax.typing.DTypeLike
    ) -> jax.Array:
        """A position beyond the table becomes NaN, rather than the last one's."""
        if self.positions is None:
            table = jnp.asarray(
                sinusoids(self.arch.num_positions, self.arch.hidden_size), dtype
            )
        else:
            table = self.positions.weight[...].astype(dtype)
        rows = positions_BT + self.arch.position_offset
        return jnp.take(table, rows, axis=0, mode="fill", fill_value=jnp.nan)

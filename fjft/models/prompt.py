"""Virtual tokens: vectors, or keys and values, that stand before every row."""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from fjft.errors import UserError
from fjft.models.bits import as_bits
from fjft.models.cache import Cache
from fjft.models.mask import SHARED
from fjft.sharding import constrain


class Prompt(Protocol):
    """What a model's `prompt` slot holds; a module with either of two faces.

    Virtual tokens have positions 0 .. n - 1 and stand once in a row; the row's own
    tokens count on from n in every segment. In a causal model virtual tokens see each
    other only, so one start serves all segments of a packed row.

    Attributes:
      num_tokens: n.
    """

    num_tokens: int

    def vectors(self) -> Float[Array, "N D"] | None:
        """What goes into the first layer in the place of token vectors, float32."""
        ...

    def keys_values(self) -> Float[Array, "L 2 N K H"] | None:
        """What each layer's attention sees before its own keys and values, float32."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """Keys and values of all layers, which stand before those of the row's tokens."""

    keys_values: Float[Array, "L 2 N K H"]

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.keys_values.shape[2]

    def prepend(
        self,
        layer: Int[Array, ""],
        k_BTKH: Float[Array, "B T K H"],
        v_BTKH: Float[Array, "B T K H"],
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """One layer's own keys and values behind the virtual ones."""
        own = jax.lax.dynamic_index_in_dim(self.keys_values, layer, keepdims=False)
        k, v = (
            jnp.concatenate([jnp.broadcast_to(x, (len(y), *x.shape)), y], axis=1)
            for x, y in zip(own, (k_BTKH, v_BTKH), strict=True)
        )
        return k, v

    def fill(self, cache: Cache) -> Cache:
        """An empty cache whose first slots are the virtual tokens'."""
        L, _, N, K, H = self.keys_values.shape
        B = cache.keys.shape[1]
        cache = cache.reserve(*virtual_places(B, N))
        shape = (L, B, N, K, H)
        k, v = as_bits(
            [jnp.broadcast_to(self.keys_values[:, i, None], shape) for i in range(2)]
        )
        return dataclasses.replace(
            cache,
            keys=cache.keys.at[:, :, :N].set(k),
            values=cache.values.at[:, :, :N].set(v),
        ).advance(N)


def num_virtual_tokens(prompt: Any) -> int:
    """How many places of a row a model's `prompt` slot takes."""
    return 0 if prompt is None else prompt.num_tokens


def prefix_of(prompt: Any, dtype: jax.typing.DTypeLike) -> Prefix | None:
    """The keys and values of a model's `prompt` slot, if it holds any."""
    found = None if prompt is None else prompt.keys_values()
    if found is None:
        return None
    return Prefix(constrain(found.astype(dtype), *(None,) * found.ndim))


def vectors_of(prompt: Any) -> Float[Array, "N D"] | None:
    """The vectors of a model's `prompt` slot, if it holds any."""
    found = None if prompt is None else prompt.vectors()
    # Left to itself, XLA's partitioner joins vectors that come out of a sharded matrix
    # to those of the tokens wrongly (seen with jax 0.10.2).
    return None if found is None else constrain(found, None, None)


def virtual_places(
    batch_size: int, num_tokens: int, segment: int = SHARED
) -> tuple[Int[Array, "B N"], Int[Array, "B N"]]:
    """Positions and segments of the virtual tokens of all rows."""
    shape = (batch_size, num_tokens)
    positions = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return positions, jnp.full(shape, segment, jnp.int32)


def with_virtual_places(
    num_tokens: int,
    positions_BT: Int[Array, "B T"],
    segment_ids_BT: Int[Array, "B T"],
    segment: int = SHARED,
) -> tuple[Int[Array, "B S"], Int[Array, "B S"]]:
    """Puts virtual tokens' positions and segments before those of a row.

    Args:
      num_tokens: Virtual tokens.
      positions_BT: Positions that count on from them already.
      segment_ids_BT: Segments.
      segment: That of the virtual tokens.
    """
    virtual = virtual_places(len(positions_BT), num_tokens, segment)
    positions, segments = (
        jnp.concatenate([before, own], axis=1)
        for before, own in zip(virtual, (positions_BT, segment_ids_BT), strict=True)
    )
    return positions, segments


def prepend_vectors(
    vectors_ND: Float[Array, "N D"], x_BTD: Float[Array, "B T D"]
) -> Float[Array, "B S D"]:
    """Virtual tokens' vectors before those of each row."""
    shape = (len(x_BTD), *vectors_ND.shape)
    virtual = jnp.broadcast_to(vectors_ND.astype(x_BTD.dtype), shape)
    return jnp.concatenate([virtual, x_BTD], axis=1)


def only_segment(
    x_BTD: Float[Array, "B T D"], segment_ids_BT: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Lets no second segment of a row pass.

    Where virtual tokens see what comes after them, each segment would need its own. In
    a compiled program other segments become NaN, so that it does not go unnoticed.

    Raises:
      UserError: There is one, and it can be seen already.
    """
    is_other_BT = segment_ids_BT > 1
    if not isinstance(is_other_BT, Tracer) and bool(is_other_BT.any()):
        raise UserError(
            "packed rows with virtual tokens before an encoder: each segment would "
            "need its own; use one sequence a row (data.packing=False)"
        )
    return jnp.where(is_other_BT[..., None], jnp.nan, x_BTD).astype(x_BTD.dtype)

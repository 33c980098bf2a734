"""The keys and values of the tokens seen so far."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from fjft.models.bits import as_bits, as_numbers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of all layers in fixed slots; every row fills the same slots.

    Rows of different length are padded on the left. A slot of segment 0 is empty.

    Attributes:
      keys: Float[L, B, S, K, H], as bits; see `as_bits`.
      values: The same.
      positions: Int32[B, S].
      segment_ids: Int32[B, S]; 0 is padding or not yet written.
      length: Int32 scalar, the slots written so far.
    """

    keys: Shaped[Array, "L B S K H"]
    values: Shaped[Array, "L B S K H"]
    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    length: Int[Array, ""]

    def reserve(
        self, positions_BT: Int[Array, "B T"], segment_ids_BT: Int[Array, "B T"]
    ) -> "Cache":
        """Notes T new tokens; their keys and values follow, layer by layer."""
        start = (0, self.length)
        return dataclasses.replace(
            self,
            positions=jax.lax.dynamic_update_slice(
                self.positions, positions_BT.astype(jnp.int32), start
            ),
            segment_ids=jax.lax.dynamic_update_slice(
                self.segment_ids, segment_ids_BT.astype(jnp.int32), start
            ),
        )

    def write(
        self,
        layer: Int[Array, ""],
        k_BTKH: Float[Array, "B T K H"],
        v_BTKH: Float[Array, "B T K H"],
    ) -> "Cache":
        """Puts one layer's new keys and values into the slots after `length`."""
        start = (layer, 0, self.length, 0, 0)
        keys, values = as_bits((k_BTKH[None], v_BTKH[None]))
        return dataclasses.replace(
            self,
            keys=jax.lax.dynamic_update_slice(self.keys, keys, start),
            values=jax.lax.dynamic_update_slice(self.values, values, start),
        )

    def layer(
        self, layer: Int[Array, ""]
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """One layer's keys and values, all slots."""
        return as_numbers(
            tuple(
                jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)
                for x in (self.keys, self.values)
            )
        )

    def advance(self, num_tokens: int) -> "Cache":
        """Counts `num_tokens` slots as written."""
        return dataclasses.replace(self, length=self.length + num_tokens)


def init_cache(
    num_layers: int,
    batch_size: int,
    num_slots: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
) -> Cache:
    """An empty cache of `num_slots` slots a row."""
    shape = (num_layers, batch_size, num_slots, num_kv_heads, head_dim)
    slots = jnp.zeros((batch_size, num_slots), jnp.int32)
    return Cache(
        keys=as_bits(jnp.zeros(shape, dtype)),
        values=as_bits(jnp.zeros(shape, dtype)),
        positions=slots,
        segment_ids=slots,
        length=jnp.zeros((), jnp.int32),
    )

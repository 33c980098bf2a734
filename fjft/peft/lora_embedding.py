"""The low-rank adapter of a table of embeddings."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fjft.models.layers import Embedding, Maker, Rngs, Terms
from fjft.peft.lora_adapter import Fixed
from fjft.peft.low_rank import matrix


class TableAdapter(nnx.Module):
    """Adds `scale * A.T[id] @ B.T` to a token's vector.

    Attributes:
      a: Float32[R, V]; starts at zero.
      b: Float32[D, R]; starts at random.
      scale: Float32[].
      ranks: R alone, as an adapter's of a linear map that is not stacked.
      is_tied: Whether the table is the output head too. As in PEFT that stays as it is.
    """

    def __init__(
        self,
        rngs: Rngs,
        table: Embedding,
        rank: int,
        scale: float,
        *,
        is_tied: bool,
    ):
        size, width = table.weight.shape
        vocab_axis, axis = table.weight.get_metadata()["axes"]
        make, init = Maker(rngs, jnp.float32), jax.nn.initializers
        self.a = make((rank, size), ("rank", vocab_axis), init.zeros)
        self.b = make((width, rank), (axis, "rank"), init.normal(1.0))
        self.scale = Fixed(jnp.float32(scale), axes=())
        self.ranks = (rank,)
        self.is_tied = is_tied

    def __call__(
        self, table: Embedding, ids: Int[Array, "*B"], dtype: Any
    ) -> Float[Array, "*B D"]:
        low = self.a[...].T[ids] * self.scale[...]
        low = jnp.einsum("...R,DR->...D", low.astype(dtype), self.b[...].astype(dtype))
        return table.base(ids, dtype) + low

    def terms(self, table: Embedding, x: Float[Array, "*B D"]) -> Terms:
        """It adds nothing to the output head."""
        del table, x
        return ()

    def merge(self, table: Embedding) -> None:
        """Changes the table so that it alone gives what table and adapter give."""
        weight = table.weight[...]
        change = self.scale[...] * matrix(self.a[...], self.b[...]).T
        table.weight[...] = (weight.astype(jnp.float32) + change).astype(weight.dtype)

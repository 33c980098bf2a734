"""Which keys each query sees, described rather than spelled out."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

SHARED = -1  # the segment of virtual tokens, which every other segment sees


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """Where tokens stand.

    Attributes:
      positions: Int[B, T], restarting in every segment.
      segments: Int[B, T]; 0 is padding.
    """

    positions: Any  # JAX rebuilds trees with leaves of its own, so no type is held
    segments: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """A rule that says which keys a query sees: those of its own segment.

    Positions restart in every segment and segment 0 is padding, so the same rule holds
    for packed rows, padded rows and a cache that is partly filled. Kernels work from
    the rule itself; `dense` spells it out for a backend that has none. Tokens of the
    segment `SHARED` are seen by all segments.

    Attributes:
      queries: Where the queries stand.
      keys: Where the keys stand; None is where the queries do, which means besides
        that the tokens of a segment lie side by side and in order, and none is shared.
      window: Sees only positions less than `window` away; None sees all.
      causal: Whether later positions are hidden.
    """

    queries: Places
    keys: Places | None = None
    window: int | None = dataclasses.field(
        default=None, metadata={"static": True}, kw_only=True
    )
    causal: bool = dataclasses.field(metadata={"static": True}, kw_only=True)

    def dense(self) -> Bool[Array, "B T S"]:
        """The mask of every pair of query and key."""
        keys = self.queries if self.keys is None else self.keys
        q_pos = self.queries.positions[:, :, None]
        q_seg = self.queries.segments[:, :, None]
        kv_pos, kv_seg = keys.positions[:, None, :], keys.segments[:, None, :]
        mask = ((q_seg == kv_seg) | (kv_seg == SHARED)) & (kv_seg != 0)
        if self.causal:
            mask &= kv_pos <= q_pos
        if self.window is not None:
            distance = q_pos - kv_pos
            mask &= (distance if self.causal else jnp.abs(distance)) < self.window
        return mask


def full_mask(segment_ids_BT: Int[Array, "B T"]) -> Mask:
    """Each token sees all tokens of its own segment."""
    return Mask(Places(segment_ids_BT, segment_ids_BT), causal=False)

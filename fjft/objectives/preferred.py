"""What adds up where one text of a pair is preferred to the other."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Preferred(NamedTuple):
    """Sums over pairs.

    Attributes:
      loss: Of the losses.
      weight: How many.
      correct: How many whose chosen text has the higher reward.
      chosen: Of the rewards of chosen texts.
      rejected: Of the rewards of rejected ones.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    correct: Float[Array, ""]
    chosen: Float[Array, ""]
    rejected: Float[Array, ""]


def sum_pairs(
    is_pair_BS: Bool[Array, "B S"],
    losses_BS: Float[Array, "B S"],
    rewards_BS2: Float[Array, "B S 2"],
) -> Preferred:
    """Adds up what there is, of losses and of rewards of chosen and rejected texts."""

    def total(x_BS: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(is_pair_BS, x_BS, 0), dtype=jnp.float32)

    chosen_BS, rejected_BS = rewards_BS2[..., 0], rewards_BS2[..., 1]
    return Preferred(
        total(losses_BS),
        total(jnp.ones_like(losses_BS)),
        total((chosen_BS > rejected_BS).astype(jnp.float32)),
        total(chosen_BS),
        total(rejected_BS),
    )

"""A number for a text that is higher for those that are preferred."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from fjft.objectives.preferred import Preferred, sum_pairs
from fjft.objectives.sequence_classification import predict

EXAMPLES = "ranked"
HEAD = "sequence_classification"
NUM_LABELS = 1
METRICS = "rewards"

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the objective.

    Attributes:
      center_rewards_coefficient: Weight of the squared sum of a pair's rewards, which
        keeps them around 0 (Eisenstein et al. 2023, equation 2).
    """

    center_rewards_coefficient: float = 0.0


def loss(
    model: Any,
    batch: Batch,
    config: Config,
    *,
    rng: Key[Array, ""] | None = None,
    remat: str = "none",
) -> Preferred:
    """Sums of the loss over all pairs of a batch (Bradley and Terry 1952).

    Args:
      model: An `Encoder`, or a `Classifier`, with this head and one output.
      batch: `input_ids`, `positions` and `segment_ids`, each Int32[B, T]; `examples`,
        Int32[B, S, 2], not -1 where there is a chosen and a rejected text.
      config: Options.
      rng: Turns on what is random in training.
      remat: What the backward pass recomputes.
    """
    is_pair_BS = batch["examples"][..., 0] >= 0
    B, S = is_pair_BS.shape
    rewards = predict(model, batch, rng, remat, num_segments=2 * S)
    rewards_BS2 = rewards.reshape(B, S, 2)
    losses_BS = jax.nn.softplus(rewards_BS2[..., 1] - rewards_BS2[..., 0])
    sums_BS = jnp.sum(rewards_BS2, axis=-1)
    losses_BS += config.center_rewards_coefficient * jnp.square(sums_BS)
    return sum_pairs(is_pair_BS, losses_BS, rewards_BS2)


def evaluate(model: Any, batch: Batch, config: Config) -> Preferred:
    """Sums from which every metric of an evaluation follows; arguments as `loss`."""
    return loss(model, batch, config)

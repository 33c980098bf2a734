"""A label for each word of a text, at its first token."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fjft.objectives.sequence_classification import Config, label_sums, loss, predict

__all__ = ["Config", "Judged", "evaluate", "loss"]

EXAMPLES = "tagged"
HEAD = "token_classification"
METRICS = "entities"

Batch = dict[str, jax.Array]


class Judged(NamedTuple):
    """What an evaluation looks at.

    Attributes:
      loss: As in `Sums`; so the next.
      weight: As in `Sums`.
      said: The label that each token is given.
      labels: The label that it has, or -100.
      segment_ids: The text that it is of.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    said: Int[Array, "B T"]
    labels: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]


def evaluate(model: Any, batch: Batch, config: Config) -> Judged:
    """What the metrics of an evaluation follow from; arguments as `loss`."""
    config = config.plain()
    logits_BTC = predict(model, batch)
    sums = label_sums(logits_BTC, batch["labels"], config)
    said_BT = jnp.argmax(logits_BTC, axis=-1).astype(jnp.int32)
    return Judged(
        sums.loss, sums.weight, said_BT, batch["labels"], batch["segment_ids"]
    )

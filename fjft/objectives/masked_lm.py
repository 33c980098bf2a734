"""Prediction of hidden tokens from those on both sides."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from fjft.labels import IGNORED
from fjft.objectives.chunks import Chunks
from fjft.objectives.cross_entropy import Sums, cross_entropy_sums

EXAMPLES = "masked"
HEAD = "masked_lm"
METRICS = "masked"

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the objective; what is hidden is for `data` to say.

    Attributes:
      chunk_tokens: Tokens per device whose logits exist at a time.
      chunk_vocab_parts: Parts into which the vocabulary is cut as well; 1 is whole.
    """

    chunk_tokens: int = 512
    chunk_vocab_parts: int = 1


def loss(
    model: Any,
    batch: Batch,
    config: Config,
    *,
    rng: Key[Array, ""] | None = None,
    remat: str = "none",
) -> Sums:
    """Sums of the loss over all hidden tokens of a batch.

    Args:
      model: An `Encoder` with this head.
      batch: `input_ids`, `positions`, `segment_ids` and `labels`, -100 where nothing is
        to be predicted, each Int32[B, T].
      config: Options.
      rng: Turns on what is random in training.
      remat: What the backward pass recomputes.
    """
    body, head = (None, None) if rng is None else jax.random.split(rng)
    hidden_BTD = model.encode(
        batch["input_ids"],
        batch["positions"],
        batch["segment_ids"],
        None,
        rng=body,
        remat=remat,
    )
    is_hidden_BT = batch["labels"] != IGNORED
    return cross_entropy_sums(
        model.logit_terms(model.head.transform(hidden_BTD, head), head),
        jnp.where(is_hidden_BT, batch["labels"], 0),
        is_hidden_BT.astype(jnp.float32),
        chunks=Chunks(config.chunk_tokens, config.chunk_vocab_parts),
    )


def evaluate(model: Any, batch: Batch, config: Config) -> Sums:
    """Sums from which every metric of an evaluation follows; arguments as `loss`."""
    return loss(model, batch, config)

"""Vectors of texts: those that belong together are near, all others far."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from fjft.errors import UserError

EXAMPLES = "groups"
HEAD = "base"
METRICS = "retrieval"

POOLINGS = ("mean", "first")

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the objective.

    Attributes:
      pooling: What of a text its vector is: `mean` of all tokens, or the `first`.
      scale: What cosines are multiplied by.
      matryoshka_dims: Sizes at which the first numbers of a vector are to be a good
        vector too (Kusupati et al. 2022); their losses are added up. Empty is all of
        it only.
    """

    pooling: str = "mean"
    scale: float = 20.0
    matryoshka_dims: tuple[int, ...] = ()

    def __post_init__(self):
        if self.pooling not in POOLINGS:
            raise UserError(
                f"objective.pooling={self.pooling!r} is unknown; use one of {POOLINGS}"
            )


class Ranked(NamedTuple):
    """Sums over anchors.

    Attributes:
      loss: Of the losses, in nats.
      weight: How many.
      correct: To how many no text is nearer than their own.
      reciprocal_ranks: Of 1 / (texts that are as near as their own, or nearer).
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    correct: Float[Array, ""]
    reciprocal_ranks: Float[Array, ""]


def loss(
    model: Any,
    batch: Batch,
    config: Config,
    *,
    rng: Key[Array, ""] | None = None,
    remat: str = "none",
) -> Ranked:
    """Sums of the loss over all anchors of a batch.

    An anchor is to be nearer to its own text than to those of all others in the batch,
    and to all that belong to none: cross-entropy over scaled cosines (Henderson et al.
    2017; `MultipleNegativesRankingLoss` in sentence-transformers). What it is compared
    with is its microbatch, over all devices.

    Args:
      model: An `Encoder` without a head.
      batch: `input_ids`, `positions` and `segment_ids`, each Int32[B, T]; `examples`,
        Int32[B, S, P], not -1 where there is a text: an anchor, its own text, and where
        P is 3 one that belongs to none.
      config: Options.
      rng: Turns on what is random in training.
      remat: What the backward pass recomputes.
    """
    segment_ids, is_there_BSP = batch["segment_ids"], batch["examples"] >= 0
    P = is_there_BSP.shape[2]
    hidden_BTD = model.encode(
        batch["input_ids"],
        batch["positions"],
        segment_ids,
        None,
        rng=rng,
        remat=remat,
    )
    vectors_BSD = model.vectors(
        hidden_BTD,
        segment_ids,
        pooling=config.pooling,
        num_segments=is_there_BSP.shape[1] * P,
    )
    # N anchors; after them their own texts, then those of none.
    vectors_PND = vectors_BSD.reshape(-1, P, vectors_BSD.shape[-1]).swapaxes(0, 1)
    is_there_PN = is_there_BSP.reshape(-1, P).T
    parts = [
        _rank(vectors_PND[..., :size].astype(jnp.float32), is_there_PN, config.scale)
        for size in config.matryoshka_dims or (vectors_PND.shape[-1],)
    ]
    whole = parts[-1]
    return whole._replace(loss=sum((part.loss for part in parts), jnp.float32(0)))


def _rank(
    vectors_PND: Float[Array, "P N D"], is_there_PN: jax.Array, scale: float
) -> Ranked:
    squares = jnp.sum(jnp.square(vectors_PND), axis=-1, keepdims=True)
    vectors_PND = vectors_PND * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))
    N = vectors_PND.shape[1]
    others_MD = vectors_PND[1:].reshape(-1, vectors_PND.shape[-1])
    scores_NM = scale * jnp.einsum("ND,MD->NM", vectors_PND[0], others_MD)
    scores_NM = jnp.where(is_there_PN[1:].reshape(1, -1), scores_NM, -jnp.inf)
    # Where there is no text, nothing is compared with nothing.
    own_N = jnp.where(is_there_PN[1], jnp.diagonal(scores_NM[:, :N]), 0)
    losses_N = jax.nn.logsumexp(scores_NM, axis=1) - own_N
    ranks_N = jnp.sum(scores_NM >= own_N[:, None], axis=1)
    is_anchor_N = is_there_PN[0]

    def total(x_N: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(is_anchor_N, x_N, 0), dtype=jnp.float32)

    return Ranked(
        total(losses_N),
        total(jnp.ones_like(losses_N)),
        total((ranks_N == 1).astype(jnp.float32)),
        total(1 / jnp.maximum(ranks_N, 1).astype(jnp.float32)),
    )


def evaluate(model: Any, batch: Batch, config: Config) -> Ranked:
    """Sums from which every metric of an evaluation follows; arguments as `loss`."""
    return loss(model, batch, config)

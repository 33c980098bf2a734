"""Answers that are desirable or not, against the model as it was before training."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from fjft.errors import UserError
from fjft.objectives.causal_lm import next_token_terms
from fjft.objectives.chunks import Chunks
from fjft.objectives.log_probs import segment_log_probs

EXAMPLES = "desirable"
HEAD = None  # the checkpoint's own
METRICS = "desirability"
# `loss` and `evaluate` take the model without its adapter besides.
REFERENCE = True

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the objective.

    Attributes:
      beta: How dear it is to leave the reference.
      desirable_weight: What a desirable answer counts.
      undesirable_weight: What an undesirable one counts.
      chunk_tokens: Tokens per device whose logits exist at a time.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    chunk_tokens: int = 512

    def __post_init__(self):
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            if getattr(self, name) <= 0:
                raise UserError(
                    f"objective.{name}={getattr(self, name)} is not positive"
                )


class Judged(NamedTuple):
    """Sums over answers.

    Attributes:
      loss: Of the weighted losses.
      weight: How many.
      correct: How many that are desirable and have a higher reward than the reference
        point, or are not and have a lower one.
      desirable: Of the rewards of desirable answers.
      num_desirable: How many are.
      undesirable: Of the rewards of undesirable ones.
      num_undesirable: How many are.
      kl: Of their microbatches' divergences from the reference, in nats.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    correct: Float[Array, ""]
    desirable: Float[Array, ""]
    num_desirable: Float[Array, ""]
    undesirable: Float[Array, ""]
    num_undesirable: Float[Array, ""]
    kl: Float[Array, ""]


def loss(
    model: Any,
    batch: Batch,
    config: Config,
    *,
    reference: Any,
    rng: Key[Array, ""] | None = None,
    remat: str = "none",
) -> Judged:
    """Sums of the loss over all answers of a batch (Ethayarajh et al. 2024).

    A reward is beta times how much more probable an answer is, as a logarithm, than to
    the reference. What it is held against is beta times the divergence from the
    reference, which is estimated as in trl: the mean of the same over answers to other
    prompts, or 0. It is a microbatch's, over all devices, and nothing is learned by it.

    Args:
      model: A `Decoder`.
      batch: `input_ids`, `positions`, `segment_ids` and `labels`, each Int32[B, T];
        `examples`, Int32[B, S, 3], not -1 where there is a desirable, an undesirable
        and a mismatched answer.
      config: Options.
      reference: The same model without its adapter.
      rng: Turns on what is random in training.
      remat: What the backward pass recomputes.
    """
    is_there_BS3 = batch["examples"] >= 0
    B, S, _ = is_there_BS3.shape
    ours, theirs = (
        segment_log_probs(
            terms,
            batch,
            3 * S,
            Chunks(config.chunk_tokens),
            softcap=model.logit_softcap,
        ).learned
        for terms in (
            next_token_terms(model, batch, rng, remat),
            next_token_terms(reference, batch, None, "none"),
        )
    )
    ratios_BS3 = (ours - jax.lax.stop_gradient(theirs)).reshape(B, S, 3)

    def total(x_BS3: jax.Array) -> Float[Array, "3"]:
        present_BS3 = jnp.where(is_there_BS3, x_BS3, 0)
        return jnp.sum(present_BS3, axis=(0, 1), dtype=jnp.float32)

    counts, sums = total(jnp.ones_like(ratios_BS3)), total(ratios_BS3)
    kl = jax.lax.stop_gradient(jnp.maximum(sums[2] / jnp.maximum(counts[2], 1), 0))
    # Which way a reward is to go, and what that counts.
    wanted = jnp.array([1, -1, 0], jnp.float32)
    weights = jnp.array([config.desirable_weight, config.undesirable_weight, 0])
    gains_BS3 = (ratios_BS3 - kl) * wanted[None, None]
    losses_BS3 = jax.nn.sigmoid(-config.beta * gains_BS3)
    num_answers = counts[0] + counts[1]
    return Judged(
        loss=jnp.sum(total(losses_BS3) * weights),
        weight=num_answers,
        correct=jnp.sum(total((gains_BS3 > 0).astype(jnp.float32))),
        desirable=config.beta * sums[0],
        num_desirable=counts[0],
        undesirable=config.beta * sums[1],
        num_undesirable=counts[1],
        kl=kl * num_answers,
    )


def evaluate(model: Any, batch: Batch, config: Config, *, reference: Any) -> Judged:
    """Sums from which every metric of an evaluation follows; arguments as `loss`."""
    return loss(model, batch, config, reference=reference)

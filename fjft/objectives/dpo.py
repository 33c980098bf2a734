"""Answers that are preferred to others, against the model as it was before training."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from fjft.errors import UserError
from fjft.objectives.cross_entropy import Chunks
from fjft.objectives.log_probs import segment_log_probs

EXAMPLES = "preferences"
HEAD = None  # the checkpoint's own
METRICS = "rewards"
# `loss` and `evaluate` take the model without its adapter besides.
REFERENCE = True

LOSS_TYPES = ("sigmoid", "hinge", "ipo")

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the objective.

    Attributes:
      loss_type: `sigmoid` (Rafailov et al. 2023), `hinge` (Zhao et al. 2023) or `ipo`
        (Azar et al. 2023; of log-probabilities per token, as its authors have it).
      beta: How dear it is to leave the reference.
      label_smoothing: Share of pairs that are thought to be the wrong way round, with
        `sigmoid` (conservative DPO, Mitchell 2023).
      chunk_tokens: Tokens per device whose logits exist at a time.
    """

    loss_type: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    chunk_tokens: int = 512

    def __post_init__(self):
        if self.loss_type not in LOSS_TYPES:
            raise UserError(
                f"objective.loss_type={self.loss_type!r} is unknown; use one of "
                f"{LOSS_TYPES}"
            )
        if self.beta <= 0:
            raise UserError(f"objective.beta={self.beta} is not positive")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(
                f"objective.label_smoothing={self.label_smoothing} is not in [0, 0.5)"
            )
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise UserError(
                f"objective.label_smoothing={self.label_smoothing} goes with "
                "loss_type=sigmoid only"
            )


class Preferred(NamedTuple):
    """Sums over pairs.

    Attributes:
      loss: Of the losses.
      weight: How many.
      correct: How many whose chosen answer has the higher reward.
      chosen: Of the rewards of chosen answers: beta times how much more probable they
        are, as a logarithm, than to the reference.
      rejected: The same of rejected answers.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    correct: Float[Array, ""]
    chosen: Float[Array, ""]
    rejected: Float[Array, ""]


def loss(
    model: Any,
    batch: Batch,
    config: Config,
    *,
    reference: Any,
    rng: Key[Array, ""] | None = None,
    remat: str = "none",
) -> Preferred:
    """Sums of the loss over all pairs of a batch.

    Args:
      model: A `Decoder`.
      batch: `input_ids`, `positions`, `segment_ids` and `labels`, each Int32[B, T];
        `examples`, Int32[B, S, 2], not -1 where there is a chosen and a rejected text.
      config: Options.
      reference: The same model without its adapter.
      rng: Turns on what is random in training, and label smoothing.
      remat: What the backward pass recomputes.
    """
    is_pair_BS = batch["examples"][..., 0] >= 0
    B, S = is_pair_BS.shape
    given = batch, 2 * S, Chunks(config.chunk_tokens)
    ours, counts = segment_log_probs(model, *given, rng=rng, remat=remat)
    theirs, _ = segment_log_probs(reference, *given)
    ratios_BS2 = (ours - jax.lax.stop_gradient(theirs)).reshape(B, S, 2)
    chosen_BS, rejected_BS = ratios_BS2[..., 0], ratios_BS2[..., 1]
    if config.loss_type == "ipo":
        ratios_BS2 /= jnp.maximum(counts.reshape(B, S, 2), 1).astype(jnp.float32)
    margins_BS = ratios_BS2[..., 0] - ratios_BS2[..., 1]
    losses_BS = _losses(margins_BS, config, is_training=rng is not None)

    def total(x_BS: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(is_pair_BS, x_BS, 0), dtype=jnp.float32)

    return Preferred(
        total(losses_BS),
        total(jnp.ones_like(losses_BS)),
        total((chosen_BS > rejected_BS).astype(jnp.float32)),
        total(config.beta * chosen_BS),
        total(config.beta * rejected_BS),
    )


def _losses(
    margins_BS: Float[Array, "B S"], config: Config, *, is_training: bool
) -> Float[Array, "B S"]:
    if config.loss_type == "hinge":
        return jax.nn.relu(1 - config.beta * margins_BS)
    if config.loss_type == "ipo":
        return jnp.square(margins_BS - 1 / (2 * config.beta))
    share = config.label_smoothing if is_training else 0.0
    right, wrong = (
        jax.nn.softplus(sign * config.beta * margins_BS) for sign in (-1, 1)
    )
    return (1 - share) * right + share * wrong


def evaluate(model: Any, batch: Batch, config: Config, *, reference: Any) -> Preferred:
    """Sums from which every metric of an evaluation follows; arguments as `loss`."""
    return loss(model, batch, config, reference=reference)

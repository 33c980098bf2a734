"""Answers that are preferred to others, against the model as it was before training."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from fjft.errors import UserError
from fjft.objectives.causal_lm import next_token_terms, next_tokens
from fjft.objectives.chunks import Chunks, Terms
from fjft.objectives.divergence import Mixture, distilled_sums
from fjft.objectives.log_probs import segment_log_probs
from fjft.objectives.preferred import Preferred, sum_pairs

EXAMPLES = "preferences"
HEAD = None  # the checkpoint's own
METRICS = "preferences"
# `loss` and `evaluate` take the model without its adapter besides.
REFERENCE = True

LOSS_TYPES = ("sigmoid", "hinge", "ipo")

Batch = dict[str, jax.Array]


class Judged(NamedTuple):
    """Sums over pairs, and over the tokens of their answers.

    Attributes:
      loss: Of the losses.
      weight: How many pairs.
      correct: How many whose chosen text has the higher reward.
      chosen: Of the rewards of chosen texts.
      rejected: Of the rewards of rejected ones.
      kl: Of KL(model || reference) of each next token, in nats.
      num_tokens: How many of these.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    correct: Float[Array, ""]
    chosen: Float[Array, ""]
    rejected: Float[Array, ""]
    kl: Float[Array, ""]
    num_tokens: Float[Array, ""]


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

    A reward is beta times how much more probable an answer is, as a logarithm, than to
    the reference.

    Args:
      model: A `Decoder`.
      batch: `input_ids`, `positions`, `segment_ids` and `labels`, each Int32[B, T];
        `examples`, Int32[B, S, 2], not -1 where there is a chosen and a rejected text.
      config: Options.
      reference: The same model without its adapter.
      rng: Turns on what is random in training, and label smoothing.
      remat: What the backward pass recomputes.
    """
    ours = next_token_terms(model, batch, rng, remat)
    theirs = next_token_terms(reference, batch, None, "none")
    softcap, is_training = model.logit_softcap, rng is not None
    return _compare(ours, theirs, batch, config, softcap, is_training=is_training)


def _compare(
    ours: Terms,
    theirs: Terms,
    batch: Batch,
    config: Config,
    softcap: float | None,
    *,
    is_training: bool,
) -> Preferred:
    """Sums over pairs, from what model and reference say of the next tokens."""
    is_pair_BS = batch["examples"][..., 0] >= 0
    B, S = is_pair_BS.shape
    found, before = (
        segment_log_probs(
            terms, batch, 2 * S, Chunks(config.chunk_tokens), softcap=softcap
        )
        for terms in (ours, theirs)
    )
    ratios_BS2 = found.learned - jax.lax.stop_gradient(before.learned)
    ratios_BS2 = ratios_BS2.reshape(B, S, 2)
    compared_BS2 = ratios_BS2
    if config.loss_type == "ipo":
        counts_BS2 = jnp.maximum(found.num_learned, 1).reshape(B, S, 2)
        compared_BS2 = ratios_BS2 / counts_BS2.astype(jnp.float32)
    margins_BS = compared_BS2[..., 0] - compared_BS2[..., 1]
    losses_BS = _losses(margins_BS, config, is_training=is_training)
    return sum_pairs(is_pair_BS, losses_BS, config.beta * ratios_BS2)


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


def evaluate(model: Any, batch: Batch, config: Config, *, reference: Any) -> Judged:
    """Sums from which every metric of an evaluation follows; arguments as `loss`."""
    ours, theirs = (
        next_token_terms(each, batch, None, "none") for each in (model, reference)
    )
    softcap = model.logit_softcap
    sums = _compare(ours, theirs, batch, config, softcap, is_training=False)
    targets_BT, learned_BT = next_tokens(batch["labels"], batch["segment_ids"])
    apart = distilled_sums(
        theirs,
        ours,
        targets_BT,
        learned_BT.astype(jnp.float32),
        chunk_tokens=config.chunk_tokens,
        mixture=Mixture(1.0, 1.0, softcap, softcap),
    )
    return Judged(*sums, kl=apart.divergence, num_tokens=apart.weight)

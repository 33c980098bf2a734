"""Next tokens, learned from the text and from a larger model's predictions."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from fjft.errors import UserError
from fjft.objectives.causal_lm import next_token_terms, next_tokens
from fjft.objectives.divergence import Distilled, Mixture, distilled_sums

EXAMPLES = "text"
HEAD = None  # the checkpoint's own
METRICS = "distillation"
# `loss` and `evaluate` take the model that the config's `teacher` names besides.
TEACHER = True

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the objective.

    Attributes:
      teacher: The larger model, written like `model.source`; it has the same tokenizer.
      temperature: What both models' logits are divided by before they are compared;
        above 1, what the teacher finds unlikely counts more.
      teacher_weight: Share of the divergence from the teacher in the loss, 0 to 1; the
        rest is the text's cross-entropy.
      chunk_tokens: Tokens per device whose logits exist at a time.
    """

    teacher: str
    temperature: float = 1.0
    teacher_weight: float = 0.5
    chunk_tokens: int = 512

    def __post_init__(self):
        if self.temperature <= 0:
            raise UserError(f"objective.temperature={self.temperature} is not positive")
        if not 0 <= self.teacher_weight <= 1:
            raise UserError(
                f"objective.teacher_weight={self.teacher_weight} is not in [0, 1]"
            )


def loss(
    model: Any,
    batch: Batch,
    config: Config,
    *,
    teacher: Any,
    rng: Key[Array, ""] | None = None,
    remat: str = "none",
) -> Distilled:
    """Sums of the loss over all trained tokens of a batch; see `distilled_sums`.

    Args:
      model: A `Decoder`.
      batch: As in `causal_lm.loss`.
      config: Options.
      teacher: Another, of the same vocabulary.
      rng: Turns on what is random in training, of the model.
      remat: What the backward pass recomputes.
    """
    targets_BT, trained_BT = next_tokens(batch["labels"], batch["segment_ids"])
    return distilled_sums(
        next_token_terms(model, batch, rng, remat),
        next_token_terms(teacher, batch, None, "none"),
        targets_BT,
        trained_BT.astype(jnp.float32),
        chunk_tokens=config.chunk_tokens,
        mixture=Mixture(
            config.temperature,
            config.teacher_weight,
            model.logit_softcap,
            teacher.logit_softcap,
        ),
    )


def evaluate(model: Any, batch: Batch, config: Config, *, teacher: Any) -> Distilled:
    """Sums from which every metric of an evaluation follows; arguments as `loss`."""
    return loss(model, batch, config, teacher=teacher)

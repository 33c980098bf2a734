"""Answers that are preferred to others, without a reference (Hong et al. 2024)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from fjft.errors import UserError
from fjft.objectives.causal_lm import next_token_terms
from fjft.objectives.chunks import Chunks
from fjft.objectives.log_probs import segment_log_probs
from fjft.objectives.preferred import Preferred, sum_pairs

EXAMPLES = "preferences"
HEAD = None  # the checkpoint's own
METRICS = "rewards"

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the objective.

    Attributes:
      beta: Weight of the odds ratio beside the likelihood of chosen texts.
      chunk_tokens: Tokens per device whose logits exist at a time.
    """

    beta: float = 0.1
    chunk_tokens: int = 512

    def __post_init__(self):
        if self.beta <= 0:
            raise UserError(f"objective.beta={self.beta} is not positive")


def loss(
    model: Any,
    batch: Batch,
    config: Config,
    *,
    rng: Key[Array, ""] | None = None,
    remat: str = "none",
) -> Preferred:
    """Sums of the loss over all pairs of a batch; arguments as in `dpo.loss`.

    As in trl, the likelihood is that of all tokens of chosen texts, prompts too, and
    their mean is a microbatch's; rewards are beta times the mean log-probability of an
    answer's tokens.
    """
    is_pair_BS = batch["examples"][..., 0] >= 0
    B, S = is_pair_BS.shape
    found = segment_log_probs(
        next_token_terms(model, batch, rng, remat),
        batch,
        2 * S,
        Chunks(config.chunk_tokens),
        softcap=model.logit_softcap,
    )
    means_BS2 = (found.learned / _at_least_one(found.num_learned)).reshape(B, S, 2)
    odds_BS2 = means_BS2 - _log1mexp(means_BS2)
    losses_BS = config.beta * jax.nn.softplus(odds_BS2[..., 1] - odds_BS2[..., 0])
    sums = sum_pairs(is_pair_BS, losses_BS, config.beta * means_BS2)
    likelihood = jnp.sum(found.whole[:, ::2]) / _at_least_one(
        jnp.sum(found.num_whole[:, ::2])
    )
    return sums._replace(loss=sums.loss - sums.weight * likelihood)


def _at_least_one(count: jax.Array) -> jax.Array:
    return jnp.maximum(count, 1).astype(jnp.float32)


def _log1mexp(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """`log(1 - exp(x))` for x below 0, to the last bits (Mächler 2012)."""
    x = jnp.minimum(x, -1e-7)  # Nothing is certain, and has no odds then.
    near = jnp.log(-jnp.expm1(x))
    far = jnp.log1p(-jnp.exp(x))
    return jnp.where(x > -0.6931472, near, far)


def evaluate(model: Any, batch: Batch, config: Config) -> Preferred:
    """Sums from which every metric of an evaluation follows; arguments as `loss`."""
    return loss(model, batch, config)

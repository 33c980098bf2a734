"""Where in a text a question's answer starts and ends."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from fjft.labels import IGNORED
from fjft.objectives.cross_entropy import Sums
from fjft.objectives.sequence_classification import predict

EXAMPLES = "questions"
HEAD = "question_answering"
NUM_LABELS = 2
METRICS = "spans"

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the objective; both are of an evaluation.

    Attributes:
      n_best_size: Best starts, and as many ends, of which answers are made.
      max_answer_length: Tokens of the longest answer.
    """

    n_best_size: int = 20
    max_answer_length: int = 30


def loss(
    model: Any,
    batch: Batch,
    config: Config,
    *,
    rng: Key[Array, ""] | None = None,
    remat: str = "none",
) -> Sums:
    """Sums of the loss over all windows of a batch.

    A window's is the mean of two cross-entropies, over its own tokens: where the answer
    starts, and where it ends. (In transformers padding competes with them; between rows
    of one length there is none.)

    Args:
      model: An `Encoder` with this head.
      batch: `input_ids`, `positions`, `segment_ids` and, where the model knows types,
        `token_type_ids`, each Int32[B, T]; `labels`, Int32[B, S, 2], the places of the
        answer's first and last token in each segment, or -100.
      config: Options.
      rng: Turns on what is random in training.
      remat: What the backward pass recomputes.

    Returns:
      The sums; `correct` counts windows of which both are right.
    """
    del config
    return _sums(predict(model, batch, rng, remat), batch)


def _sums(logits_BTC: Float[Array, "B T 2"], batch: Batch) -> Sums:
    labels_BSC, places_BT = batch["labels"], batch["positions"]
    segments = jnp.arange(1, labels_BSC.shape[1] + 1, dtype=jnp.int32)
    is_in_BST = batch["segment_ids"][:, None] == segments[None, :, None]
    # A segment that is not there is spared a softmax of nothing.
    is_in_BST |= ~jnp.any(is_in_BST, axis=-1, keepdims=True)
    is_labelled_BS = labels_BSC[..., 0] != IGNORED
    logits_BSTC = jnp.where(is_in_BST[..., None], logits_BTC[:, None], -jnp.inf)
    is_right_BSTC = places_BT[:, None, :, None] == labels_BSC[:, :, None]
    is_right_BSTC &= is_in_BST[..., None]
    log_probs_BSTC = jax.nn.log_softmax(logits_BSTC, axis=2)
    right_BSC = jnp.sum(jnp.where(is_right_BSTC, log_probs_BSTC, 0), axis=2)
    losses_BS = -jnp.mean(right_BSC, axis=-1)
    said_BS1C = jnp.argmax(logits_BSTC, axis=2, keepdims=True)
    is_hit_BSC = jnp.take_along_axis(is_right_BSTC, said_BS1C, axis=2)[:, :, 0]
    is_exact_BS = is_labelled_BS & jnp.all(is_hit_BSC, axis=-1)
    return Sums(
        jnp.sum(jnp.where(is_labelled_BS, losses_BS, 0)),
        jnp.sum(is_labelled_BS, dtype=jnp.float32),
        jnp.sum(is_exact_BS, dtype=jnp.float32),
    )


class Judged(NamedTuple):
    """What an evaluation looks at.

    Attributes:
      loss: As in `Sums`; so the next.
      weight: As in `Sums`.
      logits: Of an answer's start and end at each token.
      segment_ids: The window that each token is of.
      examples: The number of each row's segments, or -1.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    logits: Float[Array, "B T 2"]
    segment_ids: Int[Array, "B T"]
    examples: Int[Array, "B S"]


def evaluate(model: Any, batch: Batch, config: Config) -> Judged:
    """What the metrics of an evaluation follow from; arguments as `loss`."""
    del config
    logits_BTC = predict(model, batch)
    sums = _sums(logits_BTC, batch)
    return Judged(
        sums.loss,
        sums.weight,
        logits_BTC,
        batch["segment_ids"],
        batch["examples"][..., 0],
    )

"""How probable a model finds whole texts, without ever holding all logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fjft.objectives.causal_lm import next_tokens
from fjft.objectives.chunks import Chunks, Terms
from fjft.objectives.cross_entropy import token_log_probs

Batch = dict[str, jax.Array]


class SegmentLogProbs(NamedTuple):
    """Log-probabilities of segments.

    Attributes:
      learned: Sum over the tokens that are learned.
      num_learned: How many.
      whole: Sum over all tokens but the first.
      num_whole: How many.
    """

    learned: Float[Array, "B S"]
    num_learned: Int[Array, "B S"]
    whole: Float[Array, "B S"]
    num_whole: Int[Array, "B S"]


def segment_log_probs(
    terms: Terms,
    batch: Batch,
    num_segments: int,
    chunks: Chunks,
    *,
    softcap: float | None,
) -> SegmentLogProbs:
    """Log-probabilities of each segment's tokens.

    Args:
      terms: Of the next tokens, see `causal_lm.next_token_terms`.
      batch: `input_ids`, `positions`, `segment_ids`, `labels`, each Int32[B, T]; of the
        labels only which are -100 counts.
      num_segments: S, the segments that a row has at most.
      chunks: Sizes of the pieces.
      softcap: As in `cross_entropy_sums`.
    """
    segment_ids = batch["segment_ids"]
    targets_BT, follows_BT = next_tokens(batch["input_ids"], segment_ids)
    log_probs_BT = token_log_probs(terms, targets_BT, chunks=chunks, softcap=softcap)
    numbers = jnp.arange(1, num_segments + 1, dtype=segment_ids.dtype)
    is_in_BST = segment_ids[:, None] == numbers[None, :, None]

    def add_up(which_BT: Bool[Array, "B T"]) -> tuple[jax.Array, jax.Array]:
        which_BST = is_in_BST & which_BT[:, None]
        sums_BS = jnp.sum(jnp.where(which_BST, log_probs_BT[:, None], 0), axis=-1)
        return sums_BS, jnp.sum(which_BST, axis=-1, dtype=jnp.int32)

    _, learned_BT = next_tokens(batch["labels"], segment_ids)
    return SegmentLogProbs(*add_up(learned_BT), *add_up(follows_BT))

"""How probable a model finds whole texts, without ever holding all logits."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from fjft.objectives.causal_lm import next_tokens
from fjft.objectives.cross_entropy import Chunks, token_log_probs

Batch = dict[str, jax.Array]


def segment_log_probs(
    model: Any,
    batch: Batch,
    num_segments: int,
    chunks: Chunks,
    *,
    rng: Key[Array, ""] | None = None,
    remat: str = "none",
) -> tuple[Float[Array, "B S"], Int[Array, "B S"]]:
    """Sums of the log-probabilities of learned tokens, by segment, and their numbers.

    Args:
      model: A `Decoder`.
      batch: `input_ids`, `positions`, `segment_ids`, `labels`, each Int32[B, T].
      num_segments: S, the segments that a row has at most.
      chunks: Sizes of the pieces.
      rng: Turns on what is random in training.
      remat: What the backward pass recomputes.
    """
    segment_ids = batch["segment_ids"]
    x_BTD = model.embed(batch["input_ids"])
    x_BTD, _ = model.backbone(
        x_BTD, batch["positions"], segment_ids, rng=rng, remat=remat
    )
    targets_BT, trained_BT = next_tokens(batch["labels"], segment_ids)
    log_probs_BT = token_log_probs(
        model.logit_terms(x_BTD, rng),
        targets_BT,
        chunks=chunks,
        softcap=model.logit_softcap,
    )
    numbers = jnp.arange(1, num_segments + 1, dtype=segment_ids.dtype)
    is_in_BST = segment_ids[:, None] == numbers[None, :, None]
    is_in_BST &= trained_BT[:, None]
    sums_BS = jnp.sum(jnp.where(is_in_BST, log_probs_BT[:, None], 0), axis=-1)
    return sums_BS, jnp.sum(is_in_BST, axis=-1, dtype=jnp.int32)

"""One text in, another out: encoder-decoders that read the right tokens so far."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from fjft.errors import UserError
from fjft.labels import IGNORED
from fjft.objectives.chunks import Chunks
from fjft.objectives.cross_entropy import Sums, cross_entropy_sums

EXAMPLES = "seq2seq"
HEAD = "seq2seq_lm"
METRICS = "perplexity"

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the objective.

    Attributes:
      label_smoothing: Share of the target's mass spread over the vocabulary.
      chunk_tokens: Tokens per device whose logits exist at a time.
      chunk_vocab_parts: Parts into which the vocabulary is cut as well; 1 is whole.
    """

    label_smoothing: float = 0.0
    chunk_tokens: int = 512
    chunk_vocab_parts: int = 1

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"objective.label_smoothing={self.label_smoothing} is not in [0, 1)"
            )


def loss(
    model: Any,
    batch: Batch,
    config: Config,
    *,
    rng: Key[Array, ""] | None = None,
    remat: str = "none",
) -> Sums:
    """Sums of the loss over all tokens of the texts to be written.

    Args:
      model: An `EncoderDecoder`.
      batch: `input_ids`, -1 beyond a source, `labels`, -100 beyond a target,
        `positions` and `segment_ids`, each Int32[B, T]: both texts of an example begin
        at the same place, and the longer one fills its segment.
      config: Options.
      rng: Turns on what is random in training. None is evaluation, in which labels are
        not smoothed either.
      remat: What the backward pass recomputes.
    """
    reading, writing = (None, None) if rng is None else jax.random.split(rng)
    memory = _read(model, batch, reading, remat)
    labels_BT = batch["labels"]
    is_learned_BT = labels_BT != IGNORED
    segments_BT = jnp.where(is_learned_BT, batch["segment_ids"], 0)
    x_BTD, _ = model.backbone(
        model.embed(model.decoder_inputs(labels_BT, batch["segment_ids"])),
        batch["positions"],
        segments_BT,
        memory=memory,
        rng=writing,
        remat=remat,
    )
    terms, bias = model.logit_terms(x_BTD, writing), model.logits_bias
    if bias is not None:
        terms = (*terms, (jnp.ones_like(x_BTD[..., :1]), bias[:, None]))
    return cross_entropy_sums(
        terms,
        jnp.where(is_learned_BT, labels_BT, 0),
        is_learned_BT.astype(jnp.float32),
        chunks=Chunks(config.chunk_tokens, config.chunk_vocab_parts),
        label_smoothing=0.0 if rng is None else config.label_smoothing,
    )


def _read(model: Any, batch: Batch, rng: jax.Array | None, remat: str) -> Any:
    ids_BT = batch["input_ids"]
    segments_BT = jnp.where(ids_BT >= 0, batch["segment_ids"], 0)
    ids_BT = jnp.maximum(ids_BT, 0)
    return model.encode(ids_BT, batch["positions"], segments_BT, rng=rng, remat=remat)


def evaluate(model: Any, batch: Batch, config: Config) -> Sums:
    """Sums from which every metric of an evaluation follows; arguments as `loss`."""
    return loss(model, batch, config)

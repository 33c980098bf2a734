"""Next-token prediction."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from fjft.labels import IGNORED
from fjft.objectives.chunks import Chunks, Terms
from fjft.objectives.cross_entropy import Sums, cross_entropy_sums

EXAMPLES = "text"
HEAD = None  # the checkpoint's own
METRICS = "perplexity"

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the objective.

    Attributes:
      label_smoothing: Share of the target's mass spread over the vocabulary.
      neftune_noise_alpha: Size of the noise on the embeddings in training; 0 is none
        (Jain et al. 2023, algorithm 1).
      chunk_tokens: Tokens per device whose logits exist at a time.
      chunk_vocab_parts: Parts into which the vocabulary is cut as well; 1 is whole.
    """

    label_smoothing: float = 0.0
    neftune_noise_alpha: float = 0.0
    chunk_tokens: int = 512
    chunk_vocab_parts: int = 1


def next_tokens(
    labels_BT: Int[Array, "B T"], segment_ids_BT: Int[Array, "B T"]
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """What each position predicts, and whether that is trained.

    With labels `[-100, 5, 6 | -100, 7]` in segments `[1, 1, 1 | 2, 2]` the targets are
    `[5, 6, _, 7, _]`: a segment's last token never predicts the next segment's first.
    """
    following = jnp.pad(labels_BT[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    same = segment_ids_BT == jnp.pad(segment_ids_BT[:, 1:], ((0, 0), (0, 1)))
    trained = (following != IGNORED) & same & (segment_ids_BT != 0)
    return jnp.where(trained, following, 0), trained


def next_token_terms(
    model: Any, batch: Batch, rng: Key[Array, ""] | None, remat: str
) -> Terms:
    """A `Decoder`'s logits of each position's next token, not multiplied out."""
    x_BTD, _ = model.backbone(
        model.embed(batch["input_ids"]),
        batch["positions"],
        batch["segment_ids"],
        rng=rng,
        remat=remat,
    )
    return model.logit_terms(x_BTD, rng)


def loss(
    model: Any,
    batch: Batch,
    config: Config,
    *,
    rng: Key[Array, ""] | None = None,
    remat: str = "none",
) -> Sums:
    """Sums of the loss over all trained tokens of a batch.

    In training the balance of a model's experts is a part of it, if its config asks
    for that with `output_router_logits`: `router_aux_loss_coef` times the loss of this
    batch's tokens, for each trained one of them, so that it joins their mean. It is no
    sum over tokens, so it sees a microbatch at a time, as in transformers.

    Args:
      model: A `Decoder`.
      batch: `input_ids`, `positions`, `segment_ids`, `labels`, each Int32[B, T].
      config: Options.
      rng: Turns on what is random in training: dropout and embedding noise. None is
        evaluation, in which labels are not smoothed either and no balance counts.
      remat: What the backward pass recomputes.
    """
    segment_ids = batch["segment_ids"]
    x_BTD = model.embed(batch["input_ids"])
    if rng is not None and config.neftune_noise_alpha:
        noise_rng, rng = jax.random.split(rng)
        x_BTD = x_BTD + _noise(
            noise_rng, x_BTD, segment_ids, config.neftune_noise_alpha
        )
    place = batch["positions"], segment_ids
    balance = jnp.zeros((), jnp.float32)
    if rng is not None and model.balance_coefficient:
        x_BTD, load = model.backbone_and_load(x_BTD, *place, rng=rng, remat=remat)
        balance = model.balance_loss(load)
    else:
        x_BTD, _ = model.backbone(x_BTD, *place, rng=rng, remat=remat)
    targets, trained = next_tokens(batch["labels"], segment_ids)
    sums = cross_entropy_sums(
        model.logit_terms(x_BTD, rng),
        targets,
        trained.astype(jnp.float32),
        chunks=Chunks(config.chunk_tokens, config.chunk_vocab_parts),
        label_smoothing=0.0 if rng is None else config.label_smoothing,
        softcap=model.logit_softcap,
    )
    return sums._replace(loss=sums.loss + balance * sums.weight)


def evaluate(model: Any, batch: Batch, config: Config) -> Sums:
    """Sums from which every metric of an evaluation follows; arguments as `loss`."""
    return loss(model, batch, config)


def _noise(
    rng: Key[Array, ""],
    x_BTD: Float[Array, "B T D"],
    segment_ids_BT: Int[Array, "B T"],
    alpha: float,
) -> Float[Array, "B T D"]:
    """Uniform noise in +-alpha / sqrt(length * D), the length being the segment's."""
    same_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    length_BT = jnp.sum(same_BTS, axis=-1).astype(jnp.float32)
    scale_BT = alpha / jnp.sqrt(length_BT * x_BTD.shape[-1])
    noise = jax.random.uniform(rng, x_BTD.shape, jnp.float32, -1.0, 1.0)
    return (noise * scale_BT[..., None]).astype(x_BTD.dtype)

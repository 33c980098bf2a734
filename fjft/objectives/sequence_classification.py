"""Labels of whole texts: one each, several each, or numbers.

A head that labels single tokens has one for each token instead of each segment.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from fjft.errors import UserError
from fjft.labels import IGNORED
from fjft.objectives.cross_entropy import Sums

EXAMPLES = "labelled"
HEAD = "sequence_classification"
METRICS = "classification"

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the objective.

    Attributes:
      label_smoothing: Share of a single label's mass that is spread over all of them,
        in training.
      class_weights: What an example of each label counts, in the order of the labels'
        ids, as in torch's `CrossEntropyLoss`; where an example may have several, what
        having one counts, as `pos_weight` in its `BCEWithLogitsLoss`. Empty is 1.
      focal_gamma: Examples with a single label count `(1 - p) ** focal_gamma`, with p
        what the model gives to the right one, in training (Lin et al. 2017, equation
        4); 0 is plain cross-entropy.
    """

    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()
    focal_gamma: float = 0.0

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"objective.label_smoothing={self.label_smoothing} is not in [0, 1)"
            )
        if self.focal_gamma < 0 or (self.focal_gamma and self.label_smoothing):
            raise UserError(
                f"objective.focal_gamma={self.focal_gamma} must not be negative, and "
                "goes without label_smoothing"
            )
        if any(weight < 0 for weight in self.class_weights):
            raise UserError(
                f"objective.class_weights={self.class_weights}: none may be negative"
            )

    def plain(self) -> "Config":
        """Without what only makes training harder."""
        return dataclasses.replace(self, label_smoothing=0.0, focal_gamma=0.0)


def predict(
    model: Any,
    batch: Batch,
    rng: Key[Array, ""] | None = None,
    remat: str = "none",
    num_segments: int | None = None,
) -> Float[Array, "B S C"]:
    """The logits of each segment, or of each token, float32.

    Args:
      model: An `Encoder`, or a `Classifier`, with this head.
      batch: `input_ids`, `positions`, `segment_ids` and, where the model knows types,
        `token_type_ids`, each Int32[B, T]; `labels`, [B, S] or [B, S, C].
      rng: Turns on what is random in training.
      remat: What the backward pass recomputes.
      num_segments: S; None is as many as there are labels.
    """
    body, head = (None, None) if rng is None else jax.random.split(rng)
    hidden_BTD = model.encode(
        batch["input_ids"],
        batch["positions"],
        batch["segment_ids"],
        batch.get("token_type_ids"),
        rng=body,
        remat=remat,
    )
    logits_BSC = model.predict(
        hidden_BTD,
        batch["segment_ids"],
        num_segments=num_segments or batch["labels"].shape[1],
        rng=head,
    )
    return logits_BSC.astype(jnp.float32)


def loss(
    model: Any,
    batch: Batch,
    config: Config,
    *,
    rng: Key[Array, ""] | None = None,
    remat: str = "none",
) -> Sums:
    """Sums of the loss over all labelled segments of a batch.

    What is learned follows from the labels: Int32[B, S] is one label each, by
    cross-entropy; Int32[B, S, C], ones and zeros, may be several, by binary
    cross-entropy; Float32[B, S, C] are numbers, by squared error. As in transformers,
    the last two are means over examples and labels. -100, or NaN, is no label.

    Returns:
      The sums; `correct` counts as `weight` does, and is 0 for numbers.

    Raises:
      UserError: `class_weights` are not as many as the labels.
    """
    if rng is None:
        config = config.plain()
    return label_sums(predict(model, batch, rng, remat), batch["labels"], config)


def label_sums(
    logits_BSC: Float[Array, "B S C"], labels: jax.Array, config: Config
) -> Sums:
    """Sums of the loss of logits; labels as in `loss`."""
    num_labels = logits_BSC.shape[-1]
    if config.class_weights and len(config.class_weights) != num_labels:
        raise UserError(
            f"objective.class_weights has {len(config.class_weights)} numbers, the "
            f"model tells {num_labels} labels apart; give one for each"
        )
    weights_C = jnp.array(config.class_weights or (1.0,) * num_labels, jnp.float32)
    if labels.ndim == 2:
        return _single(logits_BSC, labels, weights_C, config)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        return _several(logits_BSC, labels, weights_C)
    return _numbers(logits_BSC, labels)


def _single(
    logits_BSC: Float[Array, "B S C"],
    labels_BS: Int[Array, "B S"],
    weights_C: Float[Array, "C"],
    config: Config,
) -> Sums:
    is_labelled_BS = labels_BS != IGNORED
    ids_BS = jnp.where(is_labelled_BS, labels_BS, 0)
    weights_BS = jnp.where(is_labelled_BS, weights_C[ids_BS], 0)
    log_probs_BSC = jax.nn.log_softmax(logits_BSC)
    right_BS = jnp.take_along_axis(log_probs_BSC, ids_BS[..., None], axis=-1)[..., 0]
    losses_BS = -right_BS * weights_BS
    if config.focal_gamma:
        # A power below 1 has no slope at nothing.
        wrong_BS = jnp.maximum(-jnp.expm1(right_BS), 1e-12)
        losses_BS = losses_BS * wrong_BS**config.focal_gamma
    if config.label_smoothing:
        # torch weighs the mass that is spread by the label that it falls on, and
        # divides by the weights of the true ones all the same.
        spread_BS = -jnp.einsum("BSC,C->BS", log_probs_BSC, weights_C)
        spread_BS = jnp.where(is_labelled_BS, spread_BS, 0) / weights_C.size
        share = config.label_smoothing
        losses_BS = (1 - share) * losses_BS + share * spread_BS
    is_right_BS = jnp.argmax(logits_BSC, axis=-1) == ids_BS
    return Sums(
        jnp.sum(losses_BS),
        jnp.sum(weights_BS),
        jnp.sum(jnp.where(is_right_BS, weights_BS, 0)),
    )


def _several(
    logits_BSC: Float[Array, "B S C"],
    labels_BSC: Int[Array, "B S C"],
    weights_C: Float[Array, "C"],
) -> Sums:
    is_labelled = labels_BSC != IGNORED
    has = labels_BSC == 1
    positive = jax.nn.softplus(-logits_BSC) * weights_C[None, None]
    losses = jnp.where(has, positive, jax.nn.softplus(logits_BSC))
    return Sums(
        jnp.sum(jnp.where(is_labelled, losses, 0)),
        jnp.sum(is_labelled, dtype=jnp.float32),
        jnp.sum(is_labelled & (has == (logits_BSC > 0)), dtype=jnp.float32),
    )


def _numbers(
    outputs_BSC: Float[Array, "B S C"], targets_BSC: Float[Array, "B S C"]
) -> Sums:
    is_given = ~jnp.isnan(targets_BSC)
    errors = outputs_BSC - jnp.where(is_given, targets_BSC, 0)
    return Sums(
        jnp.sum(jnp.where(is_given, jnp.square(errors), 0)),
        jnp.sum(is_given, dtype=jnp.float32),
        jnp.zeros((), jnp.float32),
    )


class Judged(NamedTuple):
    """What an evaluation looks at.

    Attributes:
      loss: As in `Sums`; so the next.
      weight: As in `Sums`.
      outputs: Of the head for each example: logits, or numbers.
      labels: As in the batch.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    outputs: Float[Array, "B S C"]
    labels: Array


def evaluate(model: Any, batch: Batch, config: Config) -> Judged:
    """What the metrics of an evaluation follow from; arguments as `loss`."""
    config = config.plain()
    outputs_BSC, labels = predict(model, batch), batch["labels"]
    sums = label_sums(outputs_BSC, labels, config)
    return Judged(sums.loss, sums.weight, outputs_BSC, labels)

"""Cross-entropy and the divergence from a teacher, without ever holding all logits."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fjft.objectives.chunks import (
    Terms,
    add_gradients,
    count_chunks,
    cut,
    form_logits,
)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """How two losses become one.

    Attributes:
      temperature: What both models' logits are divided by before they are compared.
      teacher_weight: Share of the divergence; the rest is cross-entropy's.
      softcap: As in `cross_entropy_sums`.
      teacher_softcap: The teacher's.
    """

    temperature: float
    teacher_weight: float
    softcap: float | None = None
    teacher_softcap: float | None = None


class Distilled(NamedTuple):
    """What a sum over tokens gives; all float32 scalars.

    Attributes:
      loss: Weighted sum of the mixed losses, in nats.
      weight: Sum of the weights.
      correct: Weighted number of tokens whose target has the largest logit.
      cross_entropy: Weighted sum of the cross-entropies, in nats.
      divergence: Weighted sum of the divergences at their temperature, in nats.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    correct: Float[Array, ""]
    cross_entropy: Float[Array, ""]
    divergence: Float[Array, ""]


def distilled_sums(
    terms: Terms,
    teacher_terms: Terms,
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    *,
    chunk_tokens: int,
    mixture: Mixture,
) -> Distilled:
    """Sums of cross-entropy and of KL(teacher || student), times temperature squared.

    The square keeps the gradient's size whatever the temperature is (Hinton et al.
    2015, section 2). As in `cross_entropy_sums`, each chunk's gradient is worked out
    while its logits are at hand; the teacher gets none. Where a vocabulary has been
    padded further than the other, the models are compared without what is beyond.

    Args:
      terms: As in `cross_entropy_sums`.
      teacher_terms: The same of the teacher, whose vectors may be of another size.
      targets_BT: Token ids in [0, V); any valid id where the weight is 0.
      weights_BT: float32 weight of each token.
      chunk_tokens: Tokens per device whose logits exist at a time.
      mixture: How the two are mixed.
    """
    B, T = targets_BT.shape
    steps = count_chunks(B, T, chunk_tokens)
    vectors, matrices = zip(*terms, strict=True)
    taught, teacher_matrices = zip(*teacher_terms, strict=True)
    given = (
        tuple(cut(x, steps) for x in taught),
        cut(targets_BT, steps),
        cut(weights_BT, steps),
    )
    vectors = tuple(cut(x, steps) for x in vectors)
    sums: Any = _sums(vectors, matrices, given, teacher_matrices, mixture)
    loss, cross_entropy, divergence, correct = sums
    return Distilled(loss, jnp.sum(weights_BT), correct, cross_entropy, divergence)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sums(hidden, matrices, given, teacher_matrices, mixture):
    """Sums of loss, cross-entropy, divergence and of what is correct.

    For each matrix, [V, D], hidden has one [steps, B, C, D]; `given` are the same of
    the teacher, targets and weights, [steps, B, C].
    """

    def chunk(sums: Any, xs: Any) -> Any:
        hidden, given = xs
        more, _ = _compare(hidden, matrices, given, teacher_matrices, mixture)
        return sums + more, None

    return tuple(jax.lax.scan(chunk, jnp.zeros(4), (hidden, given))[0])


def _sums_forward(hidden, matrices, given, teacher_matrices, mixture):
    is_wanted = [matrix.perturbed for matrix in matrices]
    hidden, matrices, given, teacher_matrices = jax.tree.map(
        lambda x: x.value, (hidden, matrices, given, teacher_matrices)
    )

    def chunk(carry: Any, xs: Any) -> Any:
        (sums, grad_matrices), (hidden, given) = carry, xs
        more, error = _compare(hidden, matrices, given, teacher_matrices, mixture)
        zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in hidden)
        grad_hidden, grad_matrices = add_gradients(
            error, hidden, matrices, zeros, grad_matrices
        )
        return (sums + more, grad_matrices), jax.tree.map(_as, grad_hidden, hidden)

    zeros = tuple(
        jnp.zeros(matrix.shape, jnp.float32) if wanted else None
        for matrix, wanted in zip(matrices, is_wanted, strict=True)
    )
    (sums, grad_matrices), grad_hidden = jax.lax.scan(
        chunk, (jnp.zeros(4), zeros), (hidden, given)
    )
    grad_matrices = tuple(
        None if grad is None else _as(grad, matrix)
        for grad, matrix in zip(grad_matrices, matrices, strict=True)
    )
    return tuple(sums), (grad_hidden, grad_matrices)


def _sums_backward(mixture, gradients, cotangents):
    del mixture
    scale = cotangents[0]
    grad_hidden, grad_matrices = jax.tree.map(lambda x: x * _as(scale, x), gradients)
    return grad_hidden, grad_matrices, None, None


_sums.defvjp(_sums_forward, _sums_backward, symbolic_zeros=True)


def _as(x: jax.Array, like: jax.Array) -> jax.Array:
    return x.astype(like.dtype)


def _compare(hidden, matrices, given, teacher_matrices, mixture):
    """The sums of one chunk, and the gradient of its loss for its logits."""
    taught, targets, weights = given
    logits = form_logits(hidden, matrices, mixture.softcap)
    wanted = form_logits(taught, teacher_matrices, mixture.teacher_softcap)
    temperature, share = mixture.temperature, mixture.teacher_weight

    log_probs = jax.nn.log_softmax(logits)
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    is_target = ids == targets[..., None]
    cross_entropy = -jnp.sum(jnp.where(is_target, log_probs, 0), axis=-1)
    correct = -cross_entropy >= jnp.max(log_probs, axis=-1)

    size = min(logits.shape[-1], wanted.shape[-1])
    ours = jax.nn.log_softmax(logits[..., :size] / temperature)
    theirs = jax.nn.log_softmax(wanted[..., :size] / temperature)
    divergence = jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)

    loss = (1 - share) * cross_entropy + share * temperature**2 * divergence
    beyond = ((0, 0), (0, 0), (0, logits.shape[-1] - size))
    difference = jnp.pad(jnp.exp(ours) - jnp.exp(theirs), beyond)
    error = (1 - share) * (jnp.exp(log_probs) - is_target.astype(jnp.float32))
    error = error + share * temperature * difference
    if mixture.softcap is not None:
        error = error * (1 - jnp.square(logits / mixture.softcap))
    parts = (loss, cross_entropy, divergence, correct.astype(jnp.float32))
    sums = jnp.stack([jnp.sum(part * weights) for part in parts])
    return sums, error * weights[..., None]

"""Cross-entropy of a vocabulary projection, without ever holding all logits."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fjft.sharding import data_shards


@dataclasses.dataclass(frozen=True)
class Chunks:
    """How much of the logits exists at a time.

    Attributes:
      tokens: Tokens per device; rounded to what divides the sequence length.
      vocab_parts: Parts into which the vocabulary is cut; 1 keeps it whole. More parts
        save memory and cost a second product with the projection in training.
    """

    tokens: int = 512
    vocab_parts: int = 1


class Sums(NamedTuple):
    """What a sum over tokens gives; all float32 scalars.

    Attributes:
      loss: Weighted sum of the losses, in nats.
      weight: Sum of the weights.
      correct: Weighted number of tokens whose target has the largest logit.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    correct: Float[Array, ""]


def cross_entropy_sums(
    hidden_BTD: Float[Array, "B T D"],
    projection_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    *,
    chunks: Chunks,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
) -> Sums:
    """Sums of the cross-entropy of `hidden @ projection.T` against `targets`.

    The sequence is walked in chunks. Under differentiation each chunk's gradient is
    worked out right with its loss, while its logits are at hand, so that nothing of
    vocabulary size is kept or computed twice; a gradient for the projection is formed
    only if somebody asks for it. (The loss is a scalar, so the chain rule scales these
    gradients by one number; Liger-Kernel, Hsu et al. 2024, section 3.2.)

    Args:
      hidden_BTD: Hidden states.
      projection_VD: The vocabulary projection; used in the type of `hidden_BTD`,
        with float32 sums.
      targets_BT: Token ids in [0, V); any valid id where the weight is 0.
      weights_BT: float32 weight of each token.
      chunks: Sizes of the pieces.
      label_smoothing: Share of the target's mass that is spread over the vocabulary.
      softcap: Logits are bent into (-softcap, softcap) by a tanh; None leaves them.
    """
    T = hidden_BTD.shape[1]
    steps = T // _chunk_length(hidden_BTD.shape[0], T, chunks.tokens)

    def cut(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], steps, T // steps, *x.shape[2:]).swapaxes(0, 1)

    parts = _smallest_divisor(projection_VD.shape[0], at_least=chunks.vocab_parts)
    sums: Any = _sums(
        cut(hidden_BTD),
        projection_VD,
        cut(targets_BT),
        cut(weights_BT),
        parts,
        label_smoothing,
        softcap,
    )
    loss, correct = sums
    return Sums(loss, jnp.sum(weights_BT), correct)


def _chunk_length(B: int, T: int, tokens: int) -> int:
    """The largest divisor of T that gives a device at most `tokens` tokens a chunk."""
    mesh = jax.sharding.get_abstract_mesh()
    rows = max(B // (1 if mesh.empty else data_shards(mesh)), 1)
    return max(
        c for c in range(1, T + 1) if T % c == 0 and (c * rows <= tokens or c == 1)
    )


def _smallest_divisor(n: int, at_least: int) -> int:
    return next(d for d in range(min(at_least, n), n + 1) if n % d == 0)


class _Stats(NamedTuple):
    """Running statistics over parts of the vocabulary, each Float32[B, C]."""

    highest: jax.Array
    sum_exp: jax.Array
    target: jax.Array
    total: jax.Array


class _Parts(NamedTuple):
    """The projection cut along the vocabulary: [P, V / P, D], and each part's start."""

    weight: jax.Array
    start: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _sums(hidden, projection, targets, weights, num_parts, smoothing, softcap):
    """Loss and correct sums; hidden is [steps, B, C, D], targets [steps, B, C]."""
    parts = _cut_vocabulary(projection, num_parts)

    def chunk(carry: Any, xs: Any) -> Any:
        hidden, targets, weights = xs
        _, loss, correct = _chunk_loss(
            hidden, targets, weights, parts, smoothing, softcap
        )
        return (carry[0] + loss, carry[1] + correct), None

    return jax.lax.scan(chunk, _zeros(2), (hidden, targets, weights))[0]


def _sums_forward(hidden, projection, targets, weights, num_parts, smoothing, softcap):
    wants_projection = projection.perturbed
    hidden, projection, targets, weights = (
        x.value for x in (hidden, projection, targets, weights)
    )
    parts = _cut_vocabulary(projection, num_parts)

    def chunk(carry: Any, xs: Any) -> Any:
        (sums, grad_parts), (hidden, targets, weights) = carry, xs
        log_norm, loss, correct = _chunk_loss(
            hidden, targets, weights, parts, smoothing, softcap
        )
        grad_hidden, grad_parts = _chunk_gradients(
            hidden,
            targets,
            weights,
            parts,
            log_norm,
            smoothing,
            softcap,
            grad_parts,
        )
        return ((sums[0] + loss, sums[1] + correct), grad_parts), grad_hidden

    grad_parts: Any = None
    if wants_projection:
        grad_parts = jnp.zeros(parts.weight.shape, jnp.float32)
    (sums, grad_parts), grad_hidden = jax.lax.scan(
        chunk, (_zeros(2), grad_parts), (hidden, targets, weights)
    )
    if wants_projection:
        grad_parts = grad_parts.reshape(projection.shape).astype(projection.dtype)
    return sums, (grad_hidden, grad_parts)


def _sums_backward(num_parts, smoothing, softcap, gradients, cotangents):
    scale = cotangents[0]

    def scaled(gradient):
        if gradient is None:
            return None
        return (gradient * scale.astype(gradient.dtype)).astype(gradient.dtype)

    grad_hidden, grad_projection = gradients
    return scaled(grad_hidden), scaled(grad_projection), None, None


_sums.defvjp(_sums_forward, _sums_backward, symbolic_zeros=True)


def _zeros(n: int) -> tuple[jax.Array, ...]:
    return (jnp.zeros((), jnp.float32),) * n


def _cut_vocabulary(projection_VD: jax.Array, num_parts: int) -> _Parts:
    V, D = projection_VD.shape
    starts = jnp.arange(num_parts, dtype=jnp.int32) * (V // num_parts)
    return _Parts(projection_VD.reshape(num_parts, V // num_parts, D), starts)


def _chunk_loss(hidden, targets, weights, parts, smoothing, softcap):
    """The log-normalizer [B, C], and the sums of loss and correct, of one chunk."""

    def add_part(stats, part):
        logits = _logits(hidden, part.weight, softcap)
        highest = jnp.maximum(stats.highest, jnp.max(logits, axis=-1))
        shifted = jnp.exp(logits - highest[..., None])
        return _Stats(
            highest=highest,
            sum_exp=stats.sum_exp * jnp.exp(stats.highest - highest)
            + jnp.sum(shifted, axis=-1),
            target=stats.target
            + jnp.sum(jnp.where(_is_target(logits, targets, part), logits, 0), axis=-1),
            total=stats.total + jnp.sum(logits, axis=-1),
        ), None

    zeros = jnp.zeros(targets.shape, jnp.float32)
    stats = _over_parts(
        add_part, _Stats(jnp.full_like(zeros, -jnp.inf), zeros, zeros, zeros), parts
    )[0]
    log_norm = stats.highest + jnp.log(stats.sum_exp)
    vocab_size = parts.weight.shape[0] * parts.weight.shape[1]
    loss = log_norm - (1 - smoothing) * stats.target
    loss = loss - smoothing * stats.total / vocab_size
    correct = stats.target >= stats.highest
    return log_norm, jnp.sum(loss * weights), jnp.sum(jnp.where(correct, weights, 0))


def _chunk_gradients(
    hidden, targets, weights, parts, log_norm, smoothing, softcap, grad_parts
):
    """Gradients of one chunk's loss; adds the projection's to `grad_parts`, if any."""
    vocab_size = parts.weight.shape[0] * parts.weight.shape[1]

    def add_part(grad_hidden, xs):
        part, grad_part = xs
        logits = _logits(hidden, part.weight, softcap)
        wanted = jnp.where(_is_target(logits, targets, part), 1 - smoothing, 0)
        error = jnp.exp(logits - log_norm[..., None]) - wanted - smoothing / vocab_size
        if softcap is not None:
            error = error * (1 - jnp.square(logits / softcap))
        error = (error * weights[..., None]).astype(hidden.dtype)
        grad_hidden = grad_hidden + jnp.einsum(
            "BCV,VD->BCD",
            error,
            part.weight.astype(hidden.dtype),
            preferred_element_type=jnp.float32,
        )
        if grad_part is not None:
            grad_part = grad_part + jnp.einsum(
                "BCV,BCD->VD", error, hidden, preferred_element_type=jnp.float32
            )
        return grad_hidden, grad_part

    zeros = jnp.zeros(hidden.shape, jnp.float32)
    grad_hidden, grad_parts = _over_parts(add_part, zeros, (parts, grad_parts))
    return grad_hidden.astype(hidden.dtype), grad_parts


def _logits(
    hidden_BCD: jax.Array, weight_VD: jax.Array, softcap: float | None
) -> jax.Array:
    logits = jnp.einsum(
        "BCD,VD->BCV",
        hidden_BCD,
        weight_VD.astype(hidden_BCD.dtype),
        preferred_element_type=jnp.float32,
    )
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _is_target(logits: jax.Array, targets: jax.Array, part: _Parts) -> jax.Array:
    ids = part.start + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    return ids == targets[..., None]


def _over_parts(add_part: Any, carry: Any, parts: Any) -> tuple[Any, Any]:
    """Scans over the vocabulary's parts; a single part needs no loop.

    Without the loop the logits of loss and gradient are one expression to the
    compiler, which computes it once.
    """
    if jax.tree.leaves(parts)[0].shape[0] > 1:
        return jax.lax.scan(add_part, carry, parts)
    carry, out = add_part(carry, jax.tree.map(lambda x: x[0], parts))
    return carry, jax.tree.map(lambda x: x[None], out)

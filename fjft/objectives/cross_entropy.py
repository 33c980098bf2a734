"""Cross-entropy of a vocabulary projection, without ever holding all logits."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fjft.objectives.chunks import (
    Chunks,
    Terms,
    add_gradients,
    count_chunks,
    cut,
    form_logits,
    join,
)


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
    terms: Terms,
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    *,
    chunks: Chunks,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
) -> Sums:
    """Sums of the cross-entropy of logits, which are sums of products, and `targets`.

    The sequence is walked in chunks. Under differentiation each chunk's gradient is
    worked out right with its loss, while its logits are at hand, so that nothing of
    vocabulary size is kept or computed twice; a gradient for a matrix is formed only if
    somebody asks for it. (The loss is a scalar, so the chain rule scales these
    gradients by one number; Liger-Kernel, Hsu et al. 2024, section 3.2.)

    Args:
      terms: Pairs of vectors (B, T, D) and a matrix (V, D), whose products add up to
        the logits: hidden states and the vocabulary's projection, and maybe narrower
        ones that an adapter adds. A matrix is used in the type of its vectors, with
        float32 sums.
      targets_BT: Token ids in [0, V); any valid id where the weight is 0.
      weights_BT: float32 weight of each token.
      chunks: Sizes of the pieces.
      label_smoothing: Share of the target's mass that is spread over the vocabulary.
      softcap: Logits are bent into (-softcap, softcap) by a tanh; None leaves them.
    """
    vectors, matrices = zip(*terms, strict=True)
    B, T = targets_BT.shape
    steps = count_chunks(B, T, chunks.tokens)
    parts = _smallest_divisor(matrices[0].shape[0], at_least=chunks.vocab_parts)
    sums: Any = _sums(
        tuple(cut(x, steps) for x in vectors),
        matrices,
        cut(targets_BT, steps),
        cut(weights_BT, steps),
        parts,
        label_smoothing,
        softcap,
    )
    loss, correct = sums
    return Sums(loss, jnp.sum(weights_BT), correct)


def token_log_probs(
    terms: Terms,
    targets_BT: Int[Array, "B T"],
    *,
    chunks: Chunks,
    softcap: float | None = None,
) -> Float[Array, "B T"]:
    """The log-probability of each target, in float32; arguments as above.

    Where each token's own number is needed, its gradient is not known in advance: the
    backward pass works out each chunk's logits again.
    """
    vectors, matrices = zip(*terms, strict=True)
    B, T = targets_BT.shape
    steps = count_chunks(B, T, chunks.tokens)

    @jax.checkpoint
    def chunk(matrices: Any, xs: Any) -> jax.Array:
        hidden, targets = xs
        logits = form_logits(hidden, matrices, softcap)
        ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
        target = jnp.sum(jnp.where(ids == targets[..., None], logits, 0), axis=-1)
        return target - jax.nn.logsumexp(logits, axis=-1)

    log_probs = jax.lax.scan(
        lambda _, xs: (None, chunk(matrices, xs)),
        None,
        (tuple(cut(x, steps) for x in vectors), cut(targets_BT, steps)),
    )[1]
    return join(log_probs)


def _smallest_divisor(n: int, at_least: int) -> int:
    return next(d for d in range(min(at_least, n), n + 1) if n % d == 0)


class _Stats(NamedTuple):
    """Running statistics over parts of the vocabulary, each Float32[B, C]."""

    highest: jax.Array
    sum_exp: jax.Array
    target: jax.Array
    total: jax.Array


class _Parts(NamedTuple):
    """Matrices cut along the vocabulary, each [P, V / P, D], and each part's start."""

    matrices: tuple[jax.Array, ...]
    start: jax.Array

    @property
    def vocab_size(self) -> int:
        """V."""
        return math.prod(self.matrices[0].shape[:2])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _sums(hidden, matrices, targets, weights, num_parts, smoothing, softcap):
    """Loss and correct sums.

    Targets and weights are [steps, B, C], and for each matrix, which is [V, D], hidden
    has one [steps, B, C, D].
    """
    parts = _cut_vocabulary(matrices, num_parts)

    def chunk(carry: Any, xs: Any) -> Any:
        hidden, targets, weights = xs
        form = _make_form(hidden, parts, softcap)
        _, loss, correct = _chunk_loss(form, targets, weights, parts, smoothing)
        return (carry[0] + loss, carry[1] + correct), None

    return jax.lax.scan(chunk, _zeros(2), (hidden, targets, weights))[0]


def _sums_forward(hidden, matrices, targets, weights, num_parts, smoothing, softcap):
    is_wanted = [matrix.perturbed for matrix in matrices]
    hidden, matrices = (tuple(x.value for x in xs) for xs in (hidden, matrices))
    targets, weights = targets.value, weights.value
    parts = _cut_vocabulary(matrices, num_parts)

    def chunk(carry: Any, xs: Any) -> Any:
        (sums, grad_parts), (hidden, targets, weights) = carry, xs
        form = _make_form(hidden, parts, softcap)
        log_norm, loss, correct = _chunk_loss(form, targets, weights, parts, smoothing)
        grad_hidden, grad_parts = _chunk_gradients(
            form,
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

    grad_parts = tuple(
        jnp.zeros(part.shape, jnp.float32) if wanted else None
        for part, wanted in zip(parts.matrices, is_wanted, strict=True)
    )
    (sums, grad_parts), grad_hidden = jax.lax.scan(
        chunk, (_zeros(2), grad_parts), (hidden, targets, weights)
    )
    grad_matrices = tuple(
        None if grad is None else grad.reshape(matrix.shape).astype(matrix.dtype)
        for grad, matrix in zip(grad_parts, matrices, strict=True)
    )
    return sums, (grad_hidden, grad_matrices)


def _sums_backward(num_parts, smoothing, softcap, gradients, cotangents):
    scale = cotangents[0]
    grad_hidden, grad_matrices = jax.tree.map(
        lambda gradient: gradient * scale.astype(gradient.dtype), gradients
    )
    return grad_hidden, grad_matrices, None, None


_sums.defvjp(_sums_forward, _sums_backward, symbolic_zeros=True)


def _zeros(n: int) -> tuple[jax.Array, ...]:
    return (jnp.zeros((), jnp.float32),) * n


def _cut_vocabulary(matrices: tuple[jax.Array, ...], num_parts: int) -> _Parts:
    size = matrices[0].shape[0] // num_parts
    starts = jnp.arange(num_parts, dtype=jnp.int32) * size
    cut = tuple(m.reshape(num_parts, size, m.shape[1]) for m in matrices)
    return _Parts(cut, starts)


def _make_form(hidden, parts, softcap):
    """Makes what gives a part's logits; those of a single part are formed once."""
    if parts.start.shape[0] > 1:
        return lambda part: form_logits(hidden, part.matrices, softcap)
    logits = form_logits(hidden, tuple(m[0] for m in parts.matrices), softcap)
    return lambda part: logits


def _chunk_loss(form, targets, weights, parts, smoothing):
    """The log-normalizer [B, C], and the sums of loss and correct, of one chunk."""

    def add_part(stats, part):
        logits = form(part)
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
    loss = log_norm - (1 - smoothing) * stats.target
    loss = loss - smoothing * stats.total / parts.vocab_size
    correct = stats.target >= stats.highest
    return log_norm, jnp.sum(loss * weights), jnp.sum(jnp.where(correct, weights, 0))


def _chunk_gradients(
    form, hidden, targets, weights, parts, log_norm, smoothing, softcap, grad_parts
):
    """Gradients of one chunk's loss; adds those of matrices to `grad_parts`, if any."""

    def add_part(grad_hidden, xs):
        part, grad_part = xs
        logits = form(part)
        wanted = jnp.where(_is_target(logits, targets, part), 1 - smoothing, 0)
        error = jnp.exp(logits - log_norm[..., None]) - wanted
        error = error - smoothing / parts.vocab_size
        if softcap is not None:
            error = error * (1 - jnp.square(logits / softcap))
        error = error * weights[..., None]
        return add_gradients(error, hidden, part.matrices, grad_hidden, grad_part)

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in hidden)
    grad_hidden, grad_parts = _over_parts(add_part, zeros, (parts, grad_parts))
    grads = zip(grad_hidden, hidden, strict=True)
    return tuple(grad.astype(x.dtype) for grad, x in grads), grad_parts


def _is_target(logits: jax.Array, targets: jax.Array, part: _Parts) -> jax.Array:
    ids = part.start + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    return ids == targets[..., None]


def _over_parts(add_part: Any, carry: Any, parts: Any) -> tuple[Any, Any]:
    """Scans over the vocabulary's parts; a single part needs no loop."""
    if jax.tree.leaves(parts)[0].shape[0] > 1:
        return jax.lax.scan(add_part, carry, parts)
    carry, out = add_part(carry, jax.tree.map(lambda x: x[0], parts))
    return carry, jax.tree.map(lambda x: x[None], out)

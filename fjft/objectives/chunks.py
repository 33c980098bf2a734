"""Walks along a sequence in pieces, so that only a piece's logits exist at a time."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from fjft.sharding import constrain, data_shards, sequence_shards

Terms = Sequence[tuple[jax.Array, jax.Array]]


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


def cut(x: jax.Array, steps: int) -> jax.Array:
    """[B, T, ...] as [steps, B, T / steps, ...], each with tokens of every device."""
    B, T, *rest = x.shape
    shards = sequence_shards(T)
    parts = x.reshape(B, shards, steps, -1, *rest)
    parts = jnp.moveaxis(parts, 2, 0).reshape(steps, B, T // steps, *rest)
    if shards == 1:
        return parts
    return constrain(parts, None, "batch", "sequence", *(None,) * len(rest))


def join(parts: Shaped[Array, "steps B C"]) -> Shaped[Array, "B T"]:
    """Undoes `cut`."""
    steps, B, C = parts.shape
    by_shard = parts.reshape(steps, B, sequence_shards(steps * C), -1)
    return jnp.moveaxis(by_shard, 0, 2).reshape(B, steps * C)


def count_chunks(B: int, T: int, tokens: int) -> int:
    """The fewest equal chunks of at most `tokens` tokens of a device, if it can be."""
    mesh = jax.sharding.get_abstract_mesh()
    rows = max(B // (1 if mesh.empty else data_shards(mesh)), 1)
    length = T // sequence_shards(T)
    return next(
        n
        for n in range(1, length + 1)
        if length % n == 0 and (length // n * rows <= tokens or n == length)
    )


def form_logits(
    hidden: tuple[jax.Array, ...],
    matrices: tuple[jax.Array, ...],
    softcap: float | None,
) -> jax.Array:
    """The logits of a chunk, [B, C, V] in float32: sums of products, bent if asked."""
    first, *rest = (
        sum_product("BCD,VD->BCV", x, matrix.astype(x.dtype))
        for x, matrix in zip(hidden, matrices, strict=True)
    )
    logits = sum(rest, start=first)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def sum_product(axes: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """A product with sums in float32."""
    return jnp.einsum(axes, left, right, preferred_element_type=jnp.float32)


def add_gradients(
    error: jax.Array,
    hidden: tuple[jax.Array, ...],
    matrices: tuple[jax.Array, ...],
    grad_hidden: tuple[jax.Array, ...],
    grad_matrices: tuple[jax.Array | None, ...],
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array | None, ...]]:
    """Adds the gradients that follow from those of a chunk's logits, [B, C, V].

    Returns:
      The sums for `hidden`, and for those matrices whose sums so far are not None.
    """
    error = error.astype(hidden[0].dtype)
    grad_hidden = tuple(
        grad + sum_product("BCV,VD->BCD", error, matrix.astype(error.dtype))
        for grad, matrix in zip(grad_hidden, matrices, strict=True)
    )
    grad_matrices = tuple(
        None if grad is None else grad + sum_product("BCV,BCD->VD", error, x)
        for grad, x in zip(grad_matrices, hidden, strict=True)
    )
    return grad_hidden, grad_matrices

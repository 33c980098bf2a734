"""One vector for a sequence: its first token's, the mean, or the trained pooler's."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fjft.errors import UserError
from fjft.models.encoder_head import Head


def pool(
    x_BTD: Float[Array, "B T D"],
    segment_ids_BT: Int[Array, "B T"],
    how: str,
    num_segments: int,
) -> Float[Array, "B S D"]:
    """One vector for each of a row's segments 1 .. S.

    A segment that a row does not have gives a vector that means nothing: zero for
    `mean`, the row's first or last for `first` and `last`.

    Args:
      x_BTD: Vectors of all tokens.
      segment_ids_BT: Segments; 0 is padding.
      how: `first` and `last` take each segment's first or last token, `mean` the mean
        of all of its.
      num_segments: S.

    Raises:
      UserError: `how` is neither.
    """
    numbers = jnp.arange(1, num_segments + 1, dtype=segment_ids_BT.dtype)
    is_in_BST = segment_ids_BT[:, None, :] == numbers[None, :, None]
    if how == "first":
        first_BS = jnp.argmax(is_in_BST, axis=-1)
        return jnp.take_along_axis(x_BTD, first_BS[:, :, None], axis=1)
    if how == "last":
        from_end_BS = jnp.argmax(is_in_BST[:, :, ::-1], axis=-1)
        last_BS = x_BTD.shape[1] - 1 - from_end_BS
        return jnp.take_along_axis(x_BTD, last_BS[:, :, None], axis=1)
    if how == "mean":
        share_BST = is_in_BST.astype(jnp.float32)
        counts_BS1 = jnp.maximum(share_BST.sum(-1, keepdims=True), 1)
        sums_BSD = jnp.einsum("BST,BTD->BSD", share_BST, x_BTD.astype(jnp.float32))
        return (sums_BSD / counts_BS1).astype(x_BTD.dtype)
    raise UserError(f"pooling={how!r} is unknown; use 'first', 'last' or 'mean'")


def embed_sentences(
    model: Any,
    input_ids: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    token_type_ids: Int[Array, "B T"] | None = None,
    *,
    pooling: str = "mean",
    num_segments: int | None = None,
    normalize: bool = False,
) -> Float[Array, "B *S D"]:
    """One vector for each sentence.

    Args:
      model: An encoder, with any head.
      input_ids: Tokens.
      segment_ids: All 1 when None; 0 is padding, and is not averaged over.
      token_type_ids: All 0 when None.
      pooling: `mean`; `first`, the first token, which is [CLS]; or `pooler`, that token
        through the trained map of BERT's bare model.
      num_segments: Sentences in each packed row; None is one, without an axis for it.
      normalize: Whether vectors are scaled to length 1, as for cosine similarity.

    Raises:
      UserError: The pooling is unknown, or the model has no trained pooler.
    """
    head: Head = model.head
    if pooling == "pooler":
        new = model.provenance.new if model.provenance is not None else ()
        if head.plan.kind != "base" or head.dense is None or new:
            raise UserError(
                "the model has no trained pooler; use pooling='mean' or 'first', or "
                "load a checkpoint that has one with head='base'"
            )
    segments = jnp.ones_like(input_ids) if segment_ids is None else segment_ids
    hidden = model.encode(input_ids, None, segments, token_type_ids)
    how = "first" if pooling == "pooler" else pooling
    vectors = pool(hidden, segments, how, num_segments or 1)
    if pooling == "pooler":
        vectors = head.transform(vectors)
    if normalize:
        squares = jnp.square(vectors.astype(jnp.float32)).sum(-1, keepdims=True)
        length = jnp.sqrt(jnp.maximum(squares, 1e-24))
        vectors = (vectors.astype(jnp.float32) / length).astype(vectors.dtype)
    return vectors if num_segments is not None else vectors[:, 0]

"""The adapter that stands beside a frozen linear map: LoRA, DoRA, PiSSA, OLoRA."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from fjft.models.layers import (
    Embedding,
    Linear,
    Maker,
    Rngs,
    Terms,
    broadcast,
    dropout,
)
from fjft.peft import starts
from fjft.peft.low_rank import low_rank, matrix, narrow

ADAPTER = ".adapter."


class Fixed(nnx.Variable):
    """Numbers of an adapter that are not trained."""


def is_start(path: str) -> bool:
    """Whether a parameter is what an adapter started with, worked out from the base.

    It stays as it is, and a run keeps it in its checkpoints, since other devices would
    work it out to other last bits.
    """
    return f"{ADAPTER}start_" in path


class Adapter(nnx.Module):
    """Adds `scale * x @ A.T @ B.T`.

    A layer of smaller rank than its neighbours in the stack, or one that is not
    adapted at all (rank 0), has zeros in its spare rows of A and columns of B. Their
    gradients are products with each other and so stay zero.

    An adapter that starts with a part of the weight (PiSSA, OLoRA) takes that part
    away from the map again, so the map's own weight stays as it is: a frozen base is
    the checkpoint's to the last bit, and what is learned is `B A - B_start A_start`.
    One that starts as what quantization took away from the weight (LoftQ) does so only
    when it is merged, into the weight in full precision.

    Attributes:
      a: Float32[..., R, in].
      b: Float32[..., out, R].
      scale: Float32[...].
      start_a: Float32[..., R, in], A as it started, or None.
      start_b: Float32[..., out, R], B as it started, or None.
      magnitude: Float32[..., out], the lengths of the rows of the adapted weight, where
        they are trained by themselves (DoRA), or None.
      start_norms: Float32[..., out], with a magnitude the squared lengths of the rows
        of the weight that A and B add to.
      ranks: Each stacked layer's rank; one entry where nothing is stacked.
      dropout: Share of the input that is dropped in training.
      begin: How A and B start, one of `starts.NAMES`.
    """

    def __init__(
        self,
        rngs: Rngs,
        linear: Linear | Embedding,
        ranks: tuple[int, ...],
        scales: tuple[float, ...],
        *,
        dropout: float = 0.0,
        begin: str = starts.DEFAULT,
        use_dora: bool = False,
    ):
        out_axis, in_axis = linear.weight.get_metadata()["axes"][-2:]
        *stack, size_out, size_in = linear.weight.shape
        rank = max(ranks)
        used = jnp.arange(rank)[None] < jnp.array(ranks)[:, None]
        used = used.reshape(*stack, rank, 1)

        def init_a(key: jax.Array, shape: tuple, dtype: Any) -> jax.Array:
            # torch's kaiming_uniform_ with a = sqrt(5), from which PEFT starts.
            bound = 1 / math.sqrt(size_in)
            drawn = jax.random.uniform(key, shape, dtype, -bound, bound)
            return jnp.where(used, drawn, 0)

        def fixed(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Any:
            zeros = jnp.zeros((*stack, *shape), jnp.float32)
            return nnx.data(Fixed(zeros, axes=("layers",) * len(stack) + axes))

        make = Maker(rngs, jnp.float32, tuple(stack))
        shape_a, axes_a = (rank, size_in), ("rank", in_axis)
        shape_b, axes_b = (size_out, rank), (out_axis, "rank")
        self.a = make(shape_a, axes_a, init_a)
        self.b = make(shape_b, axes_b, jax.nn.initializers.zeros)
        self.scale = Fixed(
            jnp.array(scales, jnp.float32).reshape(stack), axes=("layers",) * len(stack)
        )
        self.start_a = self.start_b = nnx.data(None)
        self.magnitude = self.start_norms = nnx.data(None)
        if begin != starts.DEFAULT:
            self.start_a, self.start_b = fixed(shape_a, axes_a), fixed(shape_b, axes_b)
        if use_dora:
            ones = jax.nn.initializers.ones
            self.magnitude = nnx.data(make((size_out,), (out_axis,), ones))
            self.start_norms = fixed((size_out,), (out_axis,))
        self.ranks = ranks
        self.dropout = dropout
        self.begin = begin

    def __call__(
        self, linear: Linear, x: Float[Array, "*B in"], rng: Key[Array, ""] | None
    ) -> Float[Array, "*B out"]:
        y = self._less_start(linear.base(x), x)
        dropped = dropout(x, self.dropout, rng)
        low = low_rank(dropped, self.a[...], self.b[...], self.scale[...])
        if self.magnitude is None:
            return y + low
        if dropped is not x:
            plain = self._less_start(linear.product(dropped), dropped)
        elif linear.bias is not None:
            plain = y - broadcast(linear.bias[...].astype(y.dtype), y)
        else:
            plain = y
        # Near 1 the gain has more digits less 1. The products are float32 so that the
        # magnitude's gradient is summed so.
        gain = broadcast(self._gain(linear, x.dtype), y)
        change = (gain - 1) * plain.astype(jnp.float32) + gain * low.astype(jnp.float32)
        return y + change.astype(y.dtype)

    def terms(self, x: Float[Array, "*B in"], rng: Key[Array, ""] | None) -> Terms:
        """What it adds to an output head, as products of vectors of its rank."""
        scale = self.scale[...]
        low = narrow(dropout(x, self.dropout, rng), self.a[...], scale)
        if not self._takes_part or self.start_a is None or self.start_b is None:
            return ((low, self.b[...]),)
        begun = narrow(x, self.start_a[...], -scale)
        return (low, self.b[...]), (begun, self.start_b[...])

    @property
    def _takes_part(self) -> bool:
        """Whether the start is a part of the map's own weight."""
        return not starts.is_loftq(self.begin)

    def _less_start(self, y: jax.Array, x: jax.Array) -> jax.Array:
        """The map's output without what A and B added to it at the start."""
        if not self._takes_part or self.start_a is None or self.start_b is None:
            return y
        return y - low_rank(x, self.start_a[...], self.start_b[...], self.scale[...])

    def _gain(self, linear: Linear, dtype: Any) -> Float[Array, "out"]:
        """The magnitude over the lengths of the rows of `W + scale * B A`.

        These lengths are a constant to the gradient (Liu et al. 2024, section 4.3). The
        sum is never formed; squared, row o's length is

            |W_o|^2 + 2 scale (W A^T)_o . B_o + scale^2 B_o (A A^T) B_o^T

        in 2 R in out + 2 R^2 (in + out) FLOPs: what R more tokens would cost.
        """
        assert self.magnitude is not None
        assert self.start_norms is not None
        a, b, scale = (
            jax.lax.stop_gradient(p[...]) for p in (self.a, self.b, self.scale)
        )
        rows = a.astype(dtype)
        cross = self._less_start(linear.product(rows), rows).T.astype(jnp.float32)
        gram = jnp.einsum("Ri,Si->RS", a, a, precision="highest")
        both = 2 * cross + scale * jnp.dot(b, gram, precision="highest")
        squares = self.start_norms[...] + scale * jnp.sum(b * both, axis=-1)
        norms = jnp.sqrt(jnp.maximum(squares, jnp.finfo(jnp.float32).tiny))
        norms = jax.lax.stop_gradient(norms)
        return jnp.where(scale == 0, 1.0, self.magnitude[...] / norms)

    def start(
        self,
        linear: Linear,
        rank: Int[Array, ""],
        whole: Float[Array, "out in"] | None = None,
    ) -> None:
        """Sets what depends on the map's weight, for one layer of its stack.

        Args:
          linear: The map, without the leading axis of its stack.
          rank: The layer's rank.
          whole: The weight before it was quantized, for LoftQ.
        """
        weight, scale = linear.weight[...].astype(jnp.float32), self.scale[...]
        if self.start_a is not None and self.start_b is not None:
            size = self.a.shape[-2]
            used = jnp.arange(size) < rank
            if whole is None:
                a, b = starts.factors(self.begin, weight, size, scale)
            else:
                lost = whole.astype(jnp.float32) - weight
                a, b = starts.factors("pissa", lost, size, scale)
            a, b = jnp.where(used[:, None], a, 0), jnp.where(used[None], b, 0)
            self.a[...] = self.start_a[...] = a
            self.b[...] = self.start_b[...] = b
            if self._takes_part:
                weight = weight - scale * jnp.dot(b, a, precision="highest")
        if self.magnitude is not None and self.start_norms is not None:
            self.start_norms[...] = jnp.sum(jnp.square(weight), axis=-1)
            delta = jnp.dot(self.b[...], self.a[...], precision="highest")
            lengths = jnp.linalg.norm(weight + scale * delta, axis=-1)
            self.magnitude[...] = lengths

    def merge(self, linear: Linear) -> None:
        """Changes the map so that it alone gives what map and adapter give."""
        weight = linear.weight[...]
        scale = self.scale[...].reshape(*self.scale.shape, 1, 1)
        delta = matrix(self.a[...], self.b[...])
        if self.start_a is not None and self.start_b is not None:
            delta = delta - matrix(self.start_a[...], self.start_b[...])
        merged = weight.astype(jnp.float32) + delta * scale
        if self.magnitude is not None:
            lengths = jnp.linalg.norm(merged, axis=-1, keepdims=True)
            lengths = jnp.maximum(lengths, jnp.finfo(jnp.float32).tiny)
            gain = self.magnitude[...][..., None] / lengths
            merged = merged * jnp.where(scale == 0, 1.0, gain)
        linear.weight[...] = merged.astype(weight.dtype)

    def plain(self) -> "Adapter":
        """An adapter without a start that does the same, of twice the rank.

        `B A - B_start A_start` is one product of the columns of both B with the rows
        of both A. They take turns, so that spare ones stay behind the used ones.
        """
        assert self.start_a is not None
        assert self.start_b is not None
        graphdef, state = nnx.split(self)
        plain = nnx.merge(graphdef, state)
        a, b = self.a[...], self.b[...]
        *stack, rank, size_in = a.shape
        both_a = jnp.stack([a, self.start_a[...]], axis=-2)
        both_b = jnp.stack([b, -self.start_b[...]], axis=-1)
        axes_a, axes_b = (p.get_metadata()["axes"] for p in (self.a, self.b))
        plain.a = nnx.Param(both_a.reshape(*stack, 2 * rank, size_in), axes=axes_a)
        plain.b = nnx.Param(both_b.reshape(*b.shape[:-1], 2 * rank), axes=axes_b)
        plain.start_a = plain.start_b = nnx.data(None)
        plain.ranks = tuple(2 * rank for rank in self.ranks)
        plain.begin = starts.DEFAULT
        return plain

"""The parts that every family is made of: parameters, linear maps, norms."""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from fjft.models.narrow import narrow_product
from fjft.models.product import product
from fjft.models.quantized import Quantized

Initializer = Callable[..., jax.Array]
# Inputs [..., i] and matrices [o, i] whose products add up to a map's output.
Terms = tuple[tuple[jax.Array, jax.Array], ...]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def normal(std: float, cutoff: float | None = None) -> Initializer:
    """Normal numbers; none beyond `cutoff` times `std`, which is `std` before cutting.

    Args:
      std: Standard deviation.
      cutoff: None cuts nothing.
    """
    if cutoff is None:
        return jax.nn.initializers.normal(std)
    return jax.nn.initializers.truncated_normal(std, lower=-cutoff, upper=cutoff)


class Rngs:
    """Keys for new parameters, one after the other: those of an `nnx.Rngs`.

    They are counted in Python. Flax counts in an array, and to add to one that is being
    traced takes longer than to make the parameter.

    Args:
      seed: A number, or a key.
    """

    def __init__(self, seed: int | Key[Array, ""]):
        self.key = jax.random.key(seed) if isinstance(seed, int) else seed
        self.count = 0

    def __call__(self) -> Key[Array, ""]:
        self.count += 1
        return jax.random.fold_in(self.key, self.count - 1)


@dataclasses.dataclass(frozen=True)
class Maker:
    """Makes parameters: one row gives shape, logical axes and initializer.

    Attributes:
      rngs: Where initial values come from.
      dtype: Storage type.
      stack: Leading axes that the caller's layers are stacked over, `()` or `(L,)`.
    """

    rngs: Rngs
    dtype: Any
    stack: tuple[int, ...] = ()

    def __call__(
        self, shape: tuple[int, ...], axes: tuple[str | None, ...], init: Initializer
    ) -> nnx.Param:
        value = init(self.rngs(), (*self.stack, *shape), self.dtype)
        return nnx.Param(value, axes=("layers",) * len(self.stack) + axes)


class Shared(nnx.Variable):
    """Numbers that all layers of a stack, or of several, have in common."""


class Linear(nnx.Module):
    """The one linear map: `y = x @ weight.T + bias`, then the adapter, if any.

    The weight lies as Hugging Face has it, (out, in), so that loading is copying.

    Attributes:
      name: The attribute that holds this map in its block (`q`, `gate`, ...).
      weight: A parameter, or what `quantize` put in its place, which reads as one.
      matmuls: A key of `narrow.KINDS` multiplies in 8 bits; "" in the input's type.
      adapter: None, or a module that stands around the map: it is called as
        `adapter(linear, x, rng)` and gives what the map gives from then on. What may
        stand around an output head also has `terms(x, rng)`, what it adds to the map.
    """

    def __init__(
        self,
        make: Maker,
        name: str,
        sizes: tuple[int, int],
        axes: tuple[str, str],
        *,
        bias: bool,
        std: float,
        cutoff: float | None = None,
    ):
        self.name = name
        self.weight: Any = make(sizes, axes, normal(std, cutoff))
        self.bias = nnx.data(
            make(sizes[:1], axes[:1], jax.nn.initializers.zeros) if bias else None
        )
        self.matmuls = ""
        self.adapter = nnx.data(None)

    def __call__(
        self, x: Float[Array, "*B in"], rng: Key[Array, ""] | None = None
    ) -> Float[Array, "*B out"]:
        if self.adapter is None:
            return self.base(x)
        return self.adapter(self, x, own_key(rng, self.name))

    def base(self, x: Float[Array, "*B in"]) -> Float[Array, "*B out"]:
        """The map without its adapter."""
        y = self.product(x)
        if self.bias is None:
            return y
        return y + broadcast(self.bias[...].astype(x.dtype), y)

    def product(self, x: Float[Array, "*B in"]) -> Float[Array, "*B out"]:
        """The map without its adapter and its bias."""
        if isinstance(self.weight, Quantized):
            return self.weight.product(x)
        weight = self.weight[...].astype(x.dtype)
        if self.matmuls:
            return narrow_product(self.matmuls, x, weight)
        return product(x, weight)

    def terms(
        self, x: Float[Array, "*B in"], rng: Key[Array, ""] | None = None
    ) -> Terms:
        """The map with its adapter, but without its bias, as a sum of products."""
        own = ((x, self.weight[...]),)
        if self.adapter is None:
            return own
        return own + self.adapter.terms(x, own_key(rng, self.name))

    def quantize(self, name: str) -> None:
        """Puts codes and scales, all zero, in the weight's place.

        Args:
          name: A key of `quantized.FORMATS`.
        """
        if isinstance(self.weight, nnx.Param):
            self.weight = nnx.data(Quantized(name, self.weight))


def own_key(rng: jax.Array | None, name: str) -> jax.Array | None:
    """A key for what is random in the map, or the place, of this name."""
    return None if rng is None else jax.random.fold_in(rng, zlib.crc32(name.encode()))


def sum_terms(terms: Terms) -> Float[Array, "*B out"]:
    """The output that the products add up to, in the inputs' type."""
    first, *rest = (product(x, matrix.astype(x.dtype)) for x, matrix in terms)
    return sum(rest, start=first)


def broadcast(vector: jax.Array, like: jax.Array) -> jax.Array:
    """A vector as a view of the shape of `like`, along its last axis."""
    return jax.lax.broadcast_in_dim(vector, like.shape, (like.ndim - 1,))


class RMSNorm(nnx.Module):
    """Root-mean-square norm in float32 (Zhang and Sennrich 2019, equation 4).

    Families differ in where they round: with an `offset` the product with the weight
    is float32 too (OLMo-2), and the weight is stored less that offset (Gemma: 1).
    """

    def __init__(
        self, make: Maker, size: int, *, eps: float, offset: float | None = None
    ):
        start = jax.nn.initializers.constant(1.0 - (offset or 0.0))
        self.weight = make((size,), ("norm",), start)
        self.eps = eps
        self.offset = offset

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(mean_square + self.eps)
        if self.offset is None:
            normed = normed.astype(x.dtype)
        weight = self.weight[...].astype(normed.dtype)
        if self.offset:
            weight = weight + self.offset
        return (normed * broadcast(weight, normed)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm in float32 (Ba et al. 2016), with or without a bias."""

    def __init__(self, make: Maker, size: int, *, eps: float, bias: bool):
        self.weight = make((size,), ("norm",), jax.nn.initializers.ones)
        self.bias = nnx.data(
            make((size,), ("norm",), jax.nn.initializers.zeros) if bias else None
        )
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.eps)
        y = y * broadcast(self.weight[...].astype(jnp.float32), y)
        if self.bias is not None:
            y = y + broadcast(self.bias[...].astype(jnp.float32), y)
        return y.astype(x.dtype)


class Embedding(nnx.Module):
    """A table of vectors, (V, D); newly made, that of `padding_id` is zero.

    Attributes:
      weight: The parameter.
      adapter: None, or a module that stands around the table: it is called as
        `adapter(table, ids, dtype)`, and `adapter.terms(table, x)` is what it adds to
        an output head that is this table.
    """

    def __init__(
        self,
        make: Maker,
        vocab_size: int,
        size: int,
        *,
        std: float,
        cutoff: float | None = None,
        axis: str = "vocab",
        padding_id: int | None = None,
    ):
        def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            drawn = normal(std, cutoff)(key, shape, dtype)
            return drawn if padding_id is None else drawn.at[..., padding_id, :].set(0)

        self.weight = make((vocab_size, size), (axis, "embed"), init)
        self.adapter: Any = nnx.data(None)

    def __call__(
        self, ids: Int[Array, "*B"], dtype: jax.typing.DTypeLike
    ) -> Float[Array, "*B D"]:
        if self.adapter is None:
            return self.base(ids, dtype)
        return self.adapter(self, ids, dtype)

    def base(
        self, ids: Int[Array, "*B"], dtype: jax.typing.DTypeLike
    ) -> Float[Array, "*B D"]:
        """The table without its adapter."""
        return self.weight[...].astype(dtype)[ids]

    def terms(self, x: Float[Array, "*B D"]) -> Terms:
        """The output head that this table is, as a sum of products."""
        own = ((x, self.weight[...]),)
        return own if self.adapter is None else own + self.adapter.terms(self, x)


def adapted(
    adapter: Any,
    sublayer: str,
    out: Float[Array, "B T D"],
    x: Float[Array, "B T D"],
    norm: Callable[[jax.Array], jax.Array] | None,
    rng: Key[Array, ""] | None,
) -> Float[Array, "B T D"]:
    """A sublayer's output as a block's `adapter` slot makes it.

    Args:
      adapter: What the slot holds, a module that is called with what follows; or None.
      sublayer: `attention` or `mlp`.
      out: What the sublayer gave.
      x: The residual stream that it joins.
      norm: What norms their sum, or None.
      rng: Turns on what is random in training.
    """
    if adapter is None:
        return out
    return adapter(sublayer, out, x, norm, own_key(rng, f"{sublayer} adapter"))


class TiedHead(nnx.Module):
    """An output head that is a table of embeddings, and has no numbers of its own.

    Attributes:
      adapter: As a linear map's; it is not the table's own.
    """

    def __init__(self):
        self.adapter: Any = nnx.data(None)

    def terms(
        self, table: Embedding, x: Float[Array, "*B D"], rng: Key[Array, ""] | None
    ) -> Terms:
        """The head with its adapter as a sum of products."""
        own = table.terms(x)
        if self.adapter is None:
            return own
        return own + self.adapter.terms(x, own_key(rng, "lm_head"))


def dropout(x: jax.Array, rate: float, rng: jax.Array | None) -> jax.Array:
    """Zeroes a share of the numbers and scales the others up; nothing without rng."""
    if rng is None or not rate:
        return x
    kept = jax.random.bernoulli(rng, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0)


class GatedMLP(nnx.Module):
    """`down(act(gate(x)) * up(x))` (Shazeer 2020, "GLU variants")."""

    def __init__(
        self,
        make: Maker,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str,
        bias: bool,
        std: float,
    ):
        widen = (intermediate_size, hidden_size), ("mlp", "embed")
        narrow = (hidden_size, intermediate_size), ("embed", "mlp")
        self.gate = Linear(make, "gate", *widen, bias=bias, std=std)
        self.up = Linear(make, "up", *widen, bias=bias, std=std)
        self.down = Linear(make, "down", *narrow, bias=bias, std=std)
        self.activation = activation

    def __call__(
        self, x: Float[Array, "B T D"], rng: Key[Array, ""] | None = None
    ) -> Float[Array, "B T D"]:
        gate = ACTIVATIONS[self.activation](self.gate(x, rng))
        return self.down(gate * self.up(x, rng), rng)

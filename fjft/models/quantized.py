"""Weights of linear maps that lie in memory as codes of a few bits.

A frozen base model is only read, so it can lie there at 4 or 8 bits a number (QLoRA,
Dettmers et al. 2023) and be multiplied out inside of each matrix product.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fjft.errors import UserError
from fjft.models.codes import FORMATS, Parts

_PARTS = ("scales", "nested", "offset", "shifts")


def is_scale(path: str) -> bool:
    """Whether a parameter scales codes, and so is none of the model's numbers."""
    return path.endswith(tuple(f".weight.{part}" for part in _PARTS))


class Code(nnx.Variable):
    """A part of a quantized weight; it is not trained."""


class Quantized(nnx.Module):
    """A linear map's weight in few bits, in the place of its parameter.

    It reads as the parameter did: `weight[...]` is the matrix, of the parameter's
    dtype, `weight.shape` its shape. Inside a scan its arrays have lost their leading
    axis, and so has that.

    Attributes:
      format: A key of `FORMATS`.
      dtype: What it reads as.
      axes: The parameter's logical axes.
    """

    codes: Code

    def __init__(self, name: str, weight: nnx.Param):
        self.format = name
        self.dtype = jnp.dtype(weight.dtype)
        self.axes = weight.get_metadata()["axes"]
        parts = FORMATS[name].parts(weight.shape, self.axes)
        for part, (shape, axes, dtype) in parts.items():
            setattr(self, part, Code(jnp.zeros(shape, dtype), axes=axes))

    @property
    def shape(self) -> tuple[int, ...]:
        """The matrix's shape."""
        *lead, size_in, size_out = self.codes.shape
        return (*lead, size_out, size_in)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def get_metadata(self) -> dict[str, Any]:
        """What a parameter would tell."""
        return {"axes": self.axes}

    @property
    def part_names(self) -> tuple[str, ...]:
        """The names of its arrays."""
        return tuple(FORMATS[self.format].parts(self.shape, self.axes))

    def parts(self) -> Parts:
        """Its arrays by name."""
        return {name: getattr(self, name)[...] for name in self.part_names}

    def __getitem__(self, index: Any) -> Float[Array, "..."]:
        turned = FORMATS[self.format].dequantize(self.parts()).astype(self.dtype)
        return turned.swapaxes(-1, -2)[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        raise UserError(
            f"weights in {self.format} can only be read; restore_weights reads them in "
            "full precision, which can be changed"
        )

    def product(self, x: Float[Array, "*B in"]) -> Float[Array, "*B out"]:
        """`x @ weight.T`; for the backward pass only the codes are kept."""
        return _product(self.format, x, self.parts())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(name: str, x: jax.Array, parts: Parts) -> jax.Array:
    weight = FORMATS[name].dequantize(parts).astype(x.dtype)
    return jnp.einsum("...i,io->...o", x, weight)


def _product_forward(name: str, x: jax.Array, parts: Parts) -> tuple[jax.Array, Parts]:
    return _product(name, x, parts), parts


def _product_backward(name: str, parts: Parts, grad: jax.Array) -> tuple[Any, None]:
    weight = FORMATS[name].dequantize(parts).astype(grad.dtype)
    return jnp.einsum("...o,io->...i", grad, weight), None


_product.defvjp(_product_forward, _product_backward)

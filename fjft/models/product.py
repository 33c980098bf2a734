"""A product with a weight as it lies, (out, in)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fjft.sharding import current_device


def product(
    x: Float[Array, "*B in"], weight: Float[Array, "out in"]
) -> Float[Array, "*B out"]:
    """`x @ weight.T`, both of one type, which is the result's.

    On CPUs XLA makes float32 copies of what is multiplied where a result is bfloat16,
    in every step of a loop; where it is float32, bfloat16 is multiplied as it is. So
    there the result is rounded afterwards, which gives the same numbers.
    """
    if x.dtype == jnp.bfloat16 and current_device()[0] == "cpu":
        return _product_on_cpu(x, weight)
    return jnp.einsum("...i,oi->...o", x, weight)


@jax.custom_vjp
def _product_on_cpu(x: jax.Array, weight: jax.Array) -> jax.Array:
    return _rounded("...i,oi->...o", x, weight)


def _forward(x, weight):
    return _product_on_cpu(x, weight), (x, weight)


def _backward(operands, grad):
    x, weight = operands
    return (
        _rounded("...o,oi->...i", grad, weight),
        _rounded("...o,...i->oi", grad, x),
    )


_product_on_cpu.defvjp(_forward, _backward)


def _rounded(subscripts: str, *operands: jax.Array) -> jax.Array:
    out = jnp.einsum(subscripts, *operands, preferred_element_type=jnp.float32)
    return out.astype(jnp.bfloat16)

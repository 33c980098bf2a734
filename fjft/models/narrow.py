"""Matrix products in 8 bits, for hardware that does these twice as fast.

Both factors are rounded as they come, each row or column of them in a scale of its own.
The forward product and the gradient of its input are in 8 bits; the gradient of the
weight, a sum over all tokens that rounding hurts most, is in the input's own type
(Wortsman et al. 2023, SwitchBack).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Kind:
    """Types of 8 bits.

    Attributes:
      forward: Of inputs and weights.
      backward: Of gradients, which want range more than digits.
    """

    forward: Any
    backward: Any


# What `model.matmuls` may name.
KINDS = {
    "int8": Kind(jnp.int8, jnp.int8),
    "fp8": Kind(jnp.float8_e4m3fn, jnp.float8_e5m2),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def narrow_product(
    kind: str, x: Float[Array, "*B in"], weight: Float[Array, "out in"]
) -> Float[Array, "*B out"]:
    """`x @ weight.T` in 8 bits.

    Args:
      kind: A key of `KINDS`.
      x: A scale for each vector.
      weight: A scale for each output.
    """
    return _multiply_out(kind, x, weight)[0]


def _multiply_out(
    kind: str, x: jax.Array, weight: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The product, and the codes and scales of the weight."""
    dtype = KINDS[kind].forward
    x_codes, x_scales = _round(x, dtype)
    codes, scales = _round(weight, dtype)
    product = _multiply("...i,oi->...o", x_codes, codes)
    y = product * x_scales * _as_row(scales, product)
    return y.astype(x.dtype), codes, scales


def _forward(kind: str, x: Any, weight: Any) -> tuple[jax.Array, Any]:
    """Keeps the input only for the gradient of a weight that is trained."""
    y, codes, scales = _multiply_out(kind, x.value, weight.value)
    return y, (x.value if weight.perturbed else None, codes, scales)


def _backward(
    kind: str, residuals: Any, grad: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Both gradients; the weight's codes serve again.

    Their scales, now along the axis that is summed over, go to the gradient before that
    is rounded.
    """
    x, codes, scales = residuals
    scaled = grad.astype(jnp.float32) * _as_row(scales, grad)
    g_codes, g_scales = _round(scaled, KINDS[kind].backward)
    grad_x = _multiply("...o,oi->...i", g_codes, codes) * g_scales
    grad_weight = None
    if x is not None:
        grad_weight = jnp.einsum("...o,...i->oi", grad, x)
    return grad_x.astype(grad.dtype), grad_weight


narrow_product.defvjp(_forward, _backward, symbolic_zeros=True)


def _round(x: jax.Array, dtype: Any) -> tuple[jax.Array, Float[Array, "... 1"]]:
    """Codes, and the scale of each vector, float32."""
    is_integer = jnp.issubdtype(dtype, jnp.integer)
    limit = float((jnp.iinfo if is_integer else jnp.finfo)(dtype).max)
    x32 = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(x32), axis=-1, keepdims=True) / limit
    scaled = x32 / jnp.where(scales > 0, scales, 1.0)
    return (jnp.round(scaled) if is_integer else scaled).astype(dtype), scales


def _multiply(subscripts: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """The product of codes, as float32."""
    is_integer = jnp.issubdtype(left.dtype, jnp.integer)
    kind = jnp.int32 if is_integer else jnp.float32
    product = jnp.einsum(subscripts, left, right, preferred_element_type=kind)
    return product.astype(jnp.float32)


def _as_row(scales: Float[Array, "out 1"], like: jax.Array) -> jax.Array:
    """A scale for each output as a view of the shape of `like`."""
    axis = (like.ndim - 1,)
    return jax.lax.broadcast_in_dim(scales[:, 0], like.shape, axis)

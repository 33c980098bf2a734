"""The product of an input with a low-rank matrix, of which only the factors exist."""

import jax
import jax.numpy as jnp

from fjft.models.layers import Linear


def _narrow(x, a, scale):
    return jnp.einsum("...i,Ri->...R", x, a.astype(x.dtype)) * scale.astype(x.dtype)


@jax.custom_vjp
def narrow(x, a, scale):
    """`scale * x @ a.T`, the first half of `low_rank`."""
    return _narrow(x, a, scale)


def _narrow_backward(residuals, grad):
    x, a, scale = residuals
    grad = grad * scale.astype(grad.dtype)
    grad_x = jnp.einsum("...R,Ri->...i", grad, a.astype(grad.dtype))
    return grad_x, _sum_outer(grad, x), None


narrow.defvjp(
    lambda x, a, scale: (_narrow(x, a, scale), (x, a, scale)), _narrow_backward
)


def _sum_outer(left: jax.Array, right: jax.Array) -> jax.Array:
    """The sum of all vectors' outer products, [R, D], in float32."""
    flat = left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1])
    return jnp.einsum("BR,Bd->Rd", *flat, preferred_element_type=jnp.float32)


@jax.custom_vjp
def low_rank(x, a, b, scale):
    """`scale * x @ a.T @ b.T` in the type of x; a and b are float32."""
    return _forward(x, a, b, scale)[0]


def _forward(x, a, b, scale):
    low = _narrow(x, a, scale)
    return jnp.einsum("...R,oR->...o", low, b.astype(x.dtype)), (x, low, a, b, scale)


def _backward(residuals, grad):
    """Gradients of a and b are summed in float32 whatever the activations are.

    That of b is formed as [R, out]: then the narrow factor of the product is the one
    that has to be transposed in memory.
    """
    x, low, a, b, scale = residuals
    grad_low = jnp.einsum("...o,oR->...R", grad, b.astype(grad.dtype))
    grad_low = grad_low * scale.astype(grad.dtype)
    return (
        jnp.einsum("...R,Ri->...i", grad_low, a.astype(grad.dtype)),
        _sum_outer(grad_low, x),
        _sum_outer(low, grad).T,
        None,
    )


low_rank.defvjp(_forward, _backward)


def matrix(a: jax.Array, b: jax.Array) -> jax.Array:
    """`b @ a`, the change of a weight: Float32[..., out, in]."""
    return jnp.einsum("...oR,...Ri->...oi", b, a, precision="highest")


def add_to_weight(linear: Linear, delta: jax.Array) -> None:
    """Adds to a map's weight in float32, and rounds once."""
    weight = linear.weight[...]
    linear.weight[...] = (weight.astype(jnp.float32) + delta).astype(weight.dtype)

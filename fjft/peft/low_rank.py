"""The product of an input with a low-rank matrix, of which only the factors exist."""

import jax
import jax.numpy as jnp

from fjft.models.layers import Linear


@jax.custom_vjp
def low_rank(x, a, b, scale):
    """`scale * x @ a.T @ b.T` in the type of x; a and b are float32."""
    return _forward(x, a, b, scale)[0]


def _forward(x, a, b, scale):
    low = jnp.einsum("...i,Ri->...R", x, a.astype(x.dtype)) * scale.astype(x.dtype)
    return jnp.einsum("...R,oR->...o", low, b.astype(x.dtype)), (x, low, a, b, scale)


def _backward(residuals, grad):
    """Gradients of a and b are summed in float32 whatever the activations are.

    That of b is formed as [R, out]: then the narrow factor of the product is the one
    that has to be transposed in memory.
    """
    x, low, a, b, scale = residuals
    grad_low = jnp.einsum("...o,oR->...R", grad, b.astype(grad.dtype))
    grad_low = grad_low * scale.astype(grad.dtype)
    flat = [t.reshape(-1, t.shape[-1]) for t in (x, low, grad, grad_low)]
    flat_x, flat_low, flat_grad, flat_grad_low = flat

    def product(left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.einsum("BR,Bd->Rd", left, right, preferred_element_type=jnp.float32)

    return (
        jnp.einsum("...R,Ri->...i", grad_low, a.astype(grad.dtype)),
        product(flat_grad_low, flat_x),
        product(flat_low, flat_grad).T,
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

"""What low-rank adapters start from when they start from the weight itself."""

import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

DEFAULT = "default"
LOFTQ = "loftq"
NAMES = "default, pissa, pissa_niter_N with a number N, olora, or loftq"


def is_name(begin: str) -> bool:
    """Whether adapters may start so; `loftq_nf4` says of which base's codes."""
    names = r"default|olora|pissa(_niter_\d+)?|loftq(_\w+)?"
    return re.fullmatch(names, begin) is not None


def is_loftq(begin: str) -> bool:
    """Whether adapters start as what the base's quantization took away."""
    return begin.startswith(LOFTQ)


def factors(
    begin: str,
    weight: Float[Array, "out in"],
    rank: int,
    scale: Float[Array, ""],
) -> tuple[Float[Array, "R in"], Float[Array, "out R"]]:
    """A and B whose first r rows and columns are what an adapter of rank r starts with.

    `pissa`: the r largest singular values, their roots in A and in B, so that
    `scale * B A` is the nearest matrix of rank r (Meng et al. 2024, equation 2);
    `pissa_niter_N` finds them by N subspace iterations. `olora`: the first r columns
    of Q and rows of R of the weight's QR decomposition (Buyukakyuz 2024).

    Args:
      begin: One of these.
      weight: float32.
      rank: At most the smaller side of the weight.
      scale: What the product of B and A is multiplied by.
    """
    if begin == "olora":
        # The first columns of Q depend on the first columns of the weight alone.
        b, _ = jnp.linalg.qr(weight[:, :rank])
        return jnp.dot(b.T, weight, precision="highest"), b
    _, _, iterations = begin.partition("_niter_")
    if iterations:
        u, s, vh = _largest(weight, rank, int(iterations))
    else:
        u, s, vh = jnp.linalg.svd(weight, full_matrices=False)
    # Where nothing is adapted the scale is 0, and so are A and B.
    roots = jnp.sqrt(s[:rank] / jnp.where(scale == 0, 1, scale))
    return roots[:, None] * vh[:rank], u[:, :rank] * roots[None]


def _largest(
    weight: jax.Array, rank: int, iterations: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The largest singular values (Halko et al. 2009, algorithms 4.4 and 5.1).

    Always from the same random directions. torch, and so PEFT, searches as many as
    are wanted; some more cost little and find the smallest of these much better.
    """
    size_out, size_in = weight.shape
    count = min(rank + 8, size_out, size_in)
    drawn = jax.random.normal(jax.random.key(0), (size_in, count), weight.dtype)

    def product(left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.dot(left, right, precision="highest")

    def narrow(directions: jax.Array, _: Any) -> tuple[jax.Array, None]:
        back, _ = jnp.linalg.qr(product(weight.T, directions))
        return jnp.linalg.qr(product(weight, back))[0], None

    first, _ = jnp.linalg.qr(product(weight, drawn))
    q, _ = jax.lax.scan(narrow, first, None, length=iterations)
    u, s, vh = jnp.linalg.svd(product(q.T, weight), full_matrices=False)
    return product(q, u), s, vh

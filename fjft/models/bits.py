"""bfloat16 as its bits, where that is faster to slice.

XLA's CPU backend slices and updates bfloat16 in float32, for which it converts the
whole array in every step of a loop; integers are sliced as they lie. An integer has no
gradient, so this is for what is not differentiated; and nothing may be uint16 already.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fjft.sharding import current_device


def as_bits(arrays: Any) -> Any:
    """A pytree whose bfloat16 arrays are uint16 on CPUs."""
    if current_device()[0] != "cpu":
        return arrays
    return jax.tree.map(lambda x: _reinterpret(x, jnp.bfloat16, jnp.uint16), arrays)


def as_numbers(arrays: Any) -> Any:
    """Undoes `as_bits`."""
    return jax.tree.map(lambda x: _reinterpret(x, jnp.uint16, jnp.bfloat16), arrays)


def _reinterpret(x: jax.Array, before: Any, after: Any) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, after) if x.dtype == before else x

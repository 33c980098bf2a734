"""Attention on NVIDIA GPUs: cuDNN's kernel, on each for its own rows and heads."""

import functools
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fjft.models.mask import Mask, Places
from fjft.models.spread import spread

_DTYPES = ("bfloat16", "float16")
_WIDEST_HEAD = 128  # that all these cards train; Hopper alone has more
# Cards before Ampere, which cuDNN's kernel does not know; the older ones are called
# Tesla or Quadro, without NVIDIA.
_CARDS = re.compile(r"NVIDIA (?!TITAN|T\d|GeForce (?:GTX|MX|RTX 20))")


def has_kernel(device_kind: str, q_BTNH: jax.Array) -> bool:
    """Whether cuDNN has a kernel for such queries, as many keys, and a mask.

    Args:
      device_kind: As JAX calls the card, `NVIDIA H100 80GB HBM3`.
      q_BTNH: The queries.
    """
    _, T, N, H = q_BTNH.shape
    return (
        _CARDS.match(device_kind) is not None
        and q_BTNH.dtype.name in _DTYPES
        and H % 8 == 0
        and H <= _WIDEST_HEAD
        and T // spread(N, N, T).stretches % 2 == 0
    )


def is_kernel(primitive: Any, *_: Any, **__: Any) -> bool:
    """The remat policy that keeps what the kernel gives, since it has no names."""
    return primitive.name == "dot_product_attention_fwd_wrapper"


def cudnn_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    mask: Mask,
    *,
    scale: float,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T N H"]:
    """Attention of tokens to those of their own rows, which never holds the scores.

    Segments and windows are spelled out as a mask, of all heads together and in 16
    bits: one part in 2 N of what scores in float32 take. Causality is told besides, so
    that blocks of keys that it hides are never read.

    The kernel's backward pass adds up in no fixed order: gradients of the same step may
    differ in their last bits.

    Args:
      q_BTNH: Queries, for which `has_kernel` holds.
      k_BTKH: Keys, as many as queries.
      v_BTKH: Values.
      mask: Which keys each query sees; its `keys` must be None.
      scale: What scores are multiplied by.
      implementation: `xla` computes the same on any backend, scores and all.
    """
    T, num_heads = q_BTNH.shape[1:3]
    parts = spread(num_heads, k_BTKH.shape[2], T)
    k, v = (jnp.repeat(x, parts.repeats, axis=2) for x in (k_BTKH, v_BTKH))
    # Of a query that sees nothing cuDNN makes NaNs, so padding sees padding.
    places = Places(mask.queries.positions, mask.queries.segments + 1)
    attend = functools.partial(
        _attend_rows,
        window=mask.window,
        causal=mask.causal,
        scale=scale,
        implementation=implementation,
    )
    if jax.sharding.get_abstract_mesh().empty:
        return attend(q_BTNH, k, v, places, places)
    return jax.shard_map(
        attend,
        in_specs=(
            *(parts.queries, parts.keys, parts.keys),
            *(parts.query_tokens, parts.key_tokens),
        ),
        out_specs=parts.queries,
        check_vma=False,
    )(q_BTNH, k, v, places, places)


def _attend_rows(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    queries: Places,
    keys: Places,
    *,
    window: int | None,
    causal: bool,
    scale: float,
    implementation: Literal["cudnn", "xla"],
) -> jax.Array:
    """One device's rows, heads and queries; keys are those of whole rows."""
    mask = Mask(queries, keys, window=window, causal=causal)
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        mask=mask.dense()[:, None],
        scale=scale,
        # A stretch of queries does not begin where the keys do.
        is_causal=causal and q_BTNH.shape[1] == k_BSKH.shape[1],
        implementation=implementation,
    )

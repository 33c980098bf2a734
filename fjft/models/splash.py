"""Attention on TPU: splash attention, on every device for its own rows and heads."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from fjft.models.mask import Mask
from fjft.sharding import spec

LANES = 128  # the least block, and what blocks are multiples of
BLOCK_SIZES = (512, 384, 256, LANES)  # of queries and of keys, the best one first


def splash_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    mask: Mask,
    *,
    scale: float,
    softcap: float | None = None,
    name: str | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Attention of tokens to those of their own rows, which never holds the scores.

    Rows are cut over the mesh's batch axes and heads over its `tensor` axis, as
    activations lie anyway. Where there are fewer kv-heads than devices in `tensor`,
    each device gets the one that its query heads read; where heads do not divide at
    all, the devices of `tensor` do the same work.

    Blocks of keys that causality or the window hides from a whole block of queries are
    never read (https://docs.jax.dev/en/latest/pallas/tpu; Dao 2023).

    Args:
      q_BTNH: Queries.
      k_BTKH: Keys, as many as queries.
      v_BTKH: Values.
      mask: Which keys each query sees; its `keys` must be None.
      scale: What scores are multiplied by.
      softcap: Scores are bent into (-softcap, softcap) by a tanh; None leaves them.
      name: What remat policies call the output and the scores' norms.
      interpret: Runs the kernel's program on any backend, slowly.
    """
    scaled = q_BTNH * jnp.asarray(scale, q_BTNH.dtype)
    attend = functools.partial(
        _attend_rows,
        window=mask.window,
        causal=mask.causal,
        softcap=softcap,
        name=name,
        interpret=interpret,
    )
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return attend(scaled, k_BTKH, v_BTKH, mask.queries.segments)
    num_heads, num_kv_heads = q_BTNH.shape[2], k_BTKH.shape[2]
    shards = mesh.shape["tensor"]
    if num_heads % shards == 0 and shards % num_kv_heads == 0:
        repeats = shards // num_kv_heads
        k_BTKH, v_BTKH = (jnp.repeat(x, repeats, axis=2) for x in (k_BTKH, v_BTKH))
        num_kv_heads = shards
    divides = num_heads % shards == 0 and num_kv_heads % shards == 0
    rows = spec(("batch",))
    heads = P(*rows, None, "tensor" if divides else None)
    return jax.shard_map(
        attend, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False
    )(scaled, k_BTKH, v_BTKH, mask.queries.segments)


def _attend_rows(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: Int[Array, "B T"],
    *,
    window: int | None,
    causal: bool,
    softcap: float | None,
    name: str | None,
    interpret: bool,
) -> jax.Array:
    """One device's rows and heads, filled up to whole blocks with padding."""
    T = q_BTNH.shape[1]
    missing = -T % LANES
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))).swapaxes(1, 2)
        for x in (q_BTNH, k_BTKH, v_BTKH)
    )
    segments = jnp.pad(segments_BT, ((0, 0), (0, missing)))
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([_make_mask(T + missing, window, causal)] * q.shape[1]),
        block_sizes=_block_sizes(T + missing),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=name,
        interpret=interpret,
    )
    # Without `save_residuals` the kernel gives its output alone.
    out: Any = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segments, segments))
    return out.swapaxes(1, 2)[:, :T]


def _make_mask(length: int, window: int | None, causal: bool) -> splash.Mask:
    """The mask of a row's places, which segments cut down."""
    shape = (length, length)
    if window is not None:
        reach = window - 1
        return splash.LocalMask(shape, (reach, 0 if causal else reach), offset=0)
    return splash.CausalMask(shape) if causal else splash.FullMask(shape)


def _block_sizes(length: int) -> splash.BlockSizes:
    """The largest blocks that divide a row's length."""
    block = next(size for size in BLOCK_SIZES if length % size == 0)
    return splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )

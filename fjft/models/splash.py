"""Attention on TPU: splash attention, on every device for its own rows and heads."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from fjft.models.mask import Mask
from fjft.models.spread import spread

LANES = 128  # the least block, and what blocks are multiples of
MOST_BLOCK = 2048  # its scores alone are 16 MiB, all that a v5e lets a kernel take
BLOCK_SIZES = (512, 384, 256, LANES)  # of queries and of keys, the best one first
MOST_NUMBERS = 2048 * LANES  # of a block of keys whose gradients fit beside it


def splash_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    mask: Mask,
    *,
    scale: float,
    softcap: float | None = None,
    block: int = 0,
    name: str | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Attention of tokens to those of their own rows, which never holds the scores.

    Blocks of keys that causality or the window hides from a whole block of queries are
    never read (https://docs.jax.dev/en/latest/pallas/tpu; Dao 2023).

    Args:
      q_BTNH: Queries.
      k_BTKH: Keys, as many as queries.
      v_BTKH: Values.
      mask: Which keys each query sees; its `keys` must be None.
      scale: What scores are multiplied by.
      softcap: Scores are bent into (-softcap, softcap) by a tanh; None leaves them.
      block: Queries and keys that are taken at once, a multiple of `LANES`; rows are
        padded to whole blocks. 0 chooses by shape.
      name: What remat policies call the output and the scores' norms.
      interpret: Runs the kernel's program on any backend, slowly.
    """
    T, num_heads, width = q_BTNH.shape[1:]
    parts = spread(num_heads, k_BTKH.shape[2], T)
    k_BTKH, v_BTKH = (jnp.repeat(x, parts.repeats, axis=2) for x in (k_BTKH, v_BTKH))
    missing = -T % ((block or LANES) * parts.stretches)
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0)))
        for x in (q_BTNH * jnp.asarray(scale, q_BTNH.dtype), k_BTKH, v_BTKH)
    )
    segments = jnp.pad(mask.queries.segments, ((0, 0), (0, missing)))
    heads = [_make_mask(T + missing, mask.window, mask.causal)] * parts.heads
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask(heads),
        block_sizes=choose_blocks(
            *((T + missing) // parts.stretches, T + missing, width, mask.window),
            block=block,
        ),
        head_shards=1,
        q_seq_shards=parts.stretches,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=name,
        interpret=interpret,
    )
    arguments = kernel, q, k, v, segments, segments
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _attend_rows(*arguments)[:, :T]
    out = jax.shard_map(
        _attend_rows,
        in_specs=(
            kernel.manual_sharding_spec(
                NamedSharding(mesh, P(None, parts.query_tokens[1]))
            ),
            *(parts.queries, parts.keys, parts.keys),
            *(parts.query_tokens, parts.key_tokens),
        ),
        out_specs=parts.queries,
        check_vma=False,
    )(*arguments)
    return out[:, :T]


def _attend_rows(
    kernel: Any,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: Int[Array, "B T"],
    segments_BS: Int[Array, "B S"],
) -> jax.Array:
    """One device's rows, heads and queries; keys are those of whole rows."""
    q, k, v = (x.swapaxes(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
    # Without `save_residuals` the kernel gives its output alone.
    out: Any = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segments_BT, segments_BS))
    return out.swapaxes(1, 2)


def _make_mask(length: int, window: int | None, causal: bool) -> splash.Mask:
    """The mask of a row's places, which segments cut down."""
    shape = (length, length)
    if window is not None:
        reach = window - 1
        return splash.LocalMask(shape, (reach, 0 if causal else reach), offset=0)
    return splash.CausalMask(shape) if causal else splash.FullMask(shape)


def choose_blocks(
    queries: int, keys: int, width: int, window: int | None, *, block: int = 0
) -> splash.BlockSizes:
    """The largest blocks that divide a row's length.

    In the backward pass one kernel does the work of two, which would both work the
    scores out again. But it writes the queries' gradients for each block of keys, to be
    added up: it is taken where two blocks at most are all the keys, the chip's fast
    memory holds such a block with its gradients, and no window hides what smaller
    blocks would pass over.

    Args:
      queries: Of a device's stretch of a row.
      keys: Of the whole row.
      width: Of a head.
      window: How many of them a query sees; None is all.
      block: Taken in place of the largest.
    """
    block = block or next(size for size in BLOCK_SIZES if queries % size == 0)
    halves = keys // 2 if keys % (2 * block) == 0 else keys
    is_small = halves * max(width, LANES) <= MOST_NUMBERS
    is_one_kernel = is_small and halves <= (window or keys)
    return splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=halves if is_one_kernel else block,
        block_kv_dkv_compute=block,
        block_q_dq=None if is_one_kernel else block,
        block_kv_dq=None if is_one_kernel else block,
        use_fused_bwd_kernel=is_one_kernel,
    )

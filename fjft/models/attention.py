"""Attention through one function, which knows segments, windows and grouped heads."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from fjft.models.cudnn import cudnn_attention, has_kernel
from fjft.models.mask import Mask
from fjft.models.splash import splash_attention
from fjft.sharding import current_device, sequence_shards

# How many stretches a row's queries may be cut into, and the least that one has.
STRETCHES = (8, 4, 2)
LEAST_STRETCH = 128

ATTENTION = "attention"  # what remat policies call its output and the scores' norms

# What `model.attention` may name: a kernel where the device has one, or none.
KERNELS = ("auto", "xla")


@dataclasses.dataclass(frozen=True)
class Way:
    """How attention is worked out.

    Attributes:
      kernels: One of `KERNELS`.
      block: Queries and keys that a TPU's kernel takes at once, a multiple of
        `splash.LANES`; 0 chooses by shape.
    """

    kernels: str = "auto"
    block: int = 0


AUTO = Way()


class Attending(nnx.Module):
    """A module that attends.

    Attributes:
      way: How.
    """

    way: Way = AUTO


def set_way(model: nnx.Module, way: Way) -> None:
    """Lets all of a model's modules attend so."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Attending):
            module.way = way


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask,
    *,
    scale: float,
    softcap: float | None = None,
    bias_BNTS: Float[Array, "#B N T S"] | None = None,
    dropout: float = 0.0,
    rng: Key[Array, ""] | None = None,
    way: Way = AUTO,
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention with grouped heads; softmax in float32.

    TPUs have a kernel for tokens that see their own rows, without biases or dropout,
    and so have NVIDIA's GPUs since Ampere, in 16 bits and without soft caps; everything
    else is written out below, for the compiler. Scores exist for one call, of a causal
    row for one stretch of its queries: the backward pass works them out again. Query
    head n reads key head n // (N / K), and keys are never repeated in memory. What a
    query that is padding gets is nobody's business: it has no meaning, and no gradient
    must come of it.

    Args:
      mask: Which keys each query sees.
      scale: What scores are multiplied by.
      softcap: Scores are bent into (-softcap, softcap) by a tanh; None leaves them.
      bias_BNTS: Added to the scores after that, such as T5's relative positions.
      dropout: Share of the probabilities that is dropped; scores are kept then.
      rng: Turns that on.
      way: Which kernels may do it.
    """
    drops = dropout > 0 and rng is not None
    platform, kind = current_device()
    is_plain = mask.keys is None and bias_BNTS is None and not drops
    is_plain = is_plain and way.kernels == "auto"
    if is_plain and platform == "tpu":
        return splash_attention(
            *(q_BTNH, k_BSKH, v_BSKH, mask),
            scale=scale,
            softcap=softcap,
            block=way.block,
            name=ATTENTION,
        )
    if is_plain and softcap is None and has_kernel(kind, q_BTNH):
        return cudnn_attention(q_BTNH, k_BSKH, v_BSKH, mask, scale=scale)
    if drops:
        arguments = q_BTNH, k_BSKH, v_BSKH, mask, bias_BNTS, scale, softcap
        return _attention_with_dropout(*arguments, dropout, rng)
    arguments = q_BTNH, k_BSKH, v_BSKH, mask, bias_BNTS
    if mask.keys is None and mask.causal:
        return _attend_by_stretches(*arguments, scale, softcap)
    return _attention(*arguments, scale, softcap)


def _attend_by_stretches(q, k, v, mask, bias, scale, softcap):
    """Stretch after stretch of a row's queries, each with the keys that it may see.

    What causality or the window hides from a whole stretch is never multiplied, and
    only the scores of one stretch exist at a time.
    """
    length = q.shape[1]
    stretch = length // _count_stretches(length)
    outs = []
    for start in range(0, length, stretch):
        rows = slice(start, start + stretch)
        seen = slice(max(0, start + 1 - (mask.window or length)), rows.stop)
        queries, keys = (
            jax.tree.map(lambda x, part=part: x[:, part], mask.queries)
            for part in (rows, seen)
        )
        part = dataclasses.replace(mask, queries=queries, keys=keys)
        bias_part = None if bias is None else bias[:, :, rows, seen]
        outs.append(
            _attention(
                *(q[:, rows], k[:, seen], v[:, seen], part, bias_part), scale, softcap
            )
        )
    return outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1)


def _count_stretches(length: int) -> int:
    """How many stretches pay: none is so short that its products are slow."""
    if sequence_shards(length) > 1:
        return 1  # The devices have a stretch each already.
    counts = (n for n in STRETCHES if length % n == 0)
    return next((n for n in counts if length // n >= LEAST_STRETCH), 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(q, k, v, mask, bias, scale, softcap):
    return _forward(q, k, v, mask, bias, scale, softcap)[0]


def _forward(q, k, v, mask, bias, scale, softcap):
    """The output, and what the backward pass needs: no scores, only their norms.

    The G * T queries of a kv-head are one axis M, so that both products are plain
    batched matrix products.
    """
    scores_BKMS = _scores(q, k, mask, bias, scale, softcap)
    highest = jnp.max(scores_BKMS, axis=-1, keepdims=True)
    exps_BKMS = jnp.exp(scores_BKMS - highest)
    norm = jnp.sum(exps_BKMS, axis=-1, keepdims=True)
    out_BKMH = jnp.einsum(
        "BKMS,BKSH->BKMH",
        exps_BKMS.astype(v.dtype),
        v.swapaxes(1, 2),
        preferred_element_type=jnp.float32,
    )
    out_BKMH = (out_BKMH / norm).astype(v.dtype)
    out = checkpoint_name(_ungroup(out_BKMH, q.shape), ATTENTION)
    log_norm = checkpoint_name(highest + jnp.log(norm), ATTENTION)
    return out, (q, k, v, mask, bias, out, log_norm)


def _backward(scale, softcap, residuals, grad_out):
    """Works the probabilities out again from the scores' norms (Dao 2022, 3.1).

    Gradients of keys and values come out as [H, S]: then it is the small factor of the
    product that has to be transposed in memory, not the scores.
    """
    q, k, v, mask, bias, out, log_norm = residuals
    scores_BKMS = _scores(q, k, mask, bias, scale, softcap)
    mask_BKMS = _group_mask(mask, q, k)
    probs_BKMS = jnp.where(mask_BKMS, jnp.exp(scores_BKMS - log_norm), 0)
    grad_BKMH, out_BKMH = _group(grad_out, k.shape[2]), _group(out, k.shape[2])
    grad_v = _einsum("BKMH,BKMS->BKHS", grad_BKMH, probs_BKMS.astype(v.dtype))
    grad_probs = _einsum("BKMH,BKSH->BKMS", grad_BKMH, v.swapaxes(1, 2))
    along = jnp.sum(
        grad_BKMH.astype(jnp.float32) * out_BKMH.astype(jnp.float32), -1, keepdims=True
    )
    grad_scores = probs_BKMS * (grad_probs - along)
    grad_bias = None
    if bias is not None:
        grad_bias = _sum_to(_ungroup_scores(grad_scores, q.shape), bias)
    if softcap is not None:
        bent = scores_BKMS if bias is None else scores_BKMS - _group_bias(bias, q, k)
        slope = 1 - jnp.square(jnp.where(mask_BKMS, bent, 0) / softcap)
        grad_scores = grad_scores * slope
    grad_scores = (grad_scores * scale).astype(q.dtype)
    grad_q = _einsum("BKMS,BKSH->BKMH", grad_scores, k.swapaxes(1, 2))
    grad_k = _einsum("BKMH,BKMS->BKHS", _group(q, k.shape[2]), grad_scores)
    return (
        _ungroup(grad_q.astype(q.dtype), q.shape),
        grad_k.transpose(0, 3, 1, 2).astype(k.dtype),
        grad_v.transpose(0, 3, 1, 2).astype(v.dtype),
        None,
        grad_bias,
    )


_attention.defvjp(_forward, _backward)


def _attention_with_dropout(q, k, v, mask, bias, scale, softcap, dropout, rng):
    """As `_forward`, with holes in the probabilities."""
    probs_BKMS = jax.nn.softmax(_scores(q, k, mask, bias, scale, softcap), axis=-1)
    kept_BKMS = jax.random.bernoulli(rng, 1 - dropout, probs_BKMS.shape)
    probs_BKMS = jnp.where(kept_BKMS, probs_BKMS / (1 - dropout), 0).astype(v.dtype)
    out_BKMH = _einsum("BKMS,BKSH->BKMH", probs_BKMS, v.swapaxes(1, 2))
    return _ungroup(out_BKMH.astype(v.dtype), q.shape)


def _einsum(subscripts: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, *operands, preferred_element_type=jnp.float32)


def _scores(q, k, mask, bias, scale, softcap):
    """Masked scores, Float32[B, K, M, S]."""
    scaled = q * jnp.asarray(scale, q.dtype)
    scores = _einsum("BKMH,BKSH->BKMS", _group(scaled, k.shape[2]), k.swapaxes(1, 2))
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores = scores + _group_bias(bias, q, k)
    return jnp.where(_group_mask(mask, q, k), scores, jnp.finfo(jnp.float32).min)


def _group(x_BTNH: jax.Array, num_kv_heads: int) -> jax.Array:
    """[B, T, N, H] to [B, K, G * T, H]."""
    B, T, N, H = x_BTNH.shape
    x_BTKGH = x_BTNH.reshape(B, T, num_kv_heads, N // num_kv_heads, H)
    return x_BTKGH.transpose(0, 2, 3, 1, 4).reshape(B, num_kv_heads, -1, H)


def _ungroup(x_BKMH: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[B, K, G * T, H] to [B, T, N, H]."""
    B, T, N, H = shape
    K = x_BKMH.shape[1]
    x_BKGTH = x_BKMH.reshape(B, K, N // K, T, H)
    return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _ungroup_scores(x_BKMS: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[B, K, G * T, S] to [B, N, T, S]."""
    B, T, N, _ = shape
    return x_BKMS.reshape(B, N, T, x_BKMS.shape[-1])


def _group_mask(mask: Mask, q: jax.Array, k: jax.Array) -> jax.Array:
    """Bool[B, K, G * T, S]."""
    B, T, N, _ = q.shape
    K, S = k.shape[2], k.shape[1]
    shape = (B, K, N // K, T, S)
    return jnp.broadcast_to(mask.dense()[:, None, None], shape).reshape(B, K, -1, S)


def _group_bias(bias_BNTS: jax.Array, q: jax.Array, k: jax.Array) -> jax.Array:
    """[1 or B, N, T, S] to [1 or B, K, G * T, S], float32."""
    shape = (bias_BNTS.shape[0], k.shape[2], -1, k.shape[1])
    return bias_BNTS.reshape(shape).astype(jnp.float32)


def _sum_to(x: jax.Array, like: jax.Array) -> jax.Array:
    """Undoes a broadcast of the batch axis."""
    if like.shape[0] != x.shape[0]:
        x = jnp.sum(x, axis=0, keepdims=True)
    return x.astype(like.dtype)

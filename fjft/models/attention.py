"""Attention through one function, which knows segments, windows and grouped heads."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def attention_mask(
    q_positions_BT: Int[Array, "B T"],
    q_segments_BT: Int[Array, "B T"],
    kv_positions_BS: Int[Array, "B S"],
    kv_segments_BS: Int[Array, "B S"],
    *,
    window: int | None,
    causal: bool = True,
) -> Bool[Array, "B T S"]:
    """Which keys each query sees: those of its own segment, if causal not later ones.

    Positions restart in every segment and segment 0 is padding, so the same rule holds
    for packed rows, padded rows and a cache that is partly filled.

    Args:
      window: Sees only positions less than `window` away; None sees all.
      causal: Whether later positions are hidden.
    """
    q_pos, kv_pos = q_positions_BT[:, :, None], kv_positions_BS[:, None, :]
    q_seg, kv_seg = q_segments_BT[:, :, None], kv_segments_BS[:, None, :]
    mask = (q_seg == kv_seg) & (kv_seg != 0)
    if causal:
        mask &= kv_pos <= q_pos
    if window is not None:
        distance = q_pos - kv_pos
        mask &= (distance if causal else jnp.abs(distance)) < window
    return mask


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask_BTS: Bool[Array, "B T S"],
    *,
    scale: float,
    softcap: float | None = None,
    bias_BNTS: Float[Array, "#B N T S"] | None = None,
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention with grouped heads; softmax in float32.

    Query head n reads key head n // (N / K), and keys are never repeated in memory. A
    query that sees no key (padding) gets the mean of all values, which nobody reads.

    Args:
      scale: What scores are multiplied by.
      softcap: Scores are bent into (-softcap, softcap) by a tanh; None leaves them.
      bias_BNTS: Added to the scores after that, such as T5's relative positions.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = (q_BTNH * jnp.asarray(scale, q_BTNH.dtype)).reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    if softcap is not None:
        scores_BKGTS = softcap * jnp.tanh(scores_BKGTS / softcap)
    if bias_BNTS is not None:
        bias_BKGTS = bias_BNTS.reshape(-1, K, N // K, *scores_BKGTS.shape[3:])
        scores_BKGTS = scores_BKGTS + bias_BKGTS.astype(jnp.float32)
    lowest = jnp.finfo(jnp.float32).min
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, lowest)
    probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", probs_BKGTS, v_BSKH)
    return out_BTKGH.reshape(B, T, N, H)

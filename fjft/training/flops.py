"""Model FLOPs: what training takes at least, with nothing worked out again."""

import math
from typing import Any

import jax.numpy as jnp

from fjft import tree
from fjft.blueprint import Blueprint
from fjft.models.quantized import is_scale

_TOKEN_TABLES = ("embedding", "embeddings.words", "decoder_embedding")


def multiplied(params: tree.Params, blueprint: Blueprint) -> float:
    """How many scalars of these parameters one token's vectors are multiplied with.

    Each is two FLOPs forward, two for the gradient of its input, and two more for its
    own gradient where it is trained. Of routed experts only those that a token goes to
    count. Attention's own products are left out, as is what the backward pass
    recomputes, so the utilization worked out from it is a lower bound.
    """
    model: Any = blueprint.model
    axes = tree.logical_axes(model)
    experts: Any = getattr(model.arch, "experts", None)

    def share(path: str) -> float:
        return experts.per_token / experts.count if "expert" in axes[path] else 1.0

    def is_matrix(path: str) -> bool:
        module = path.rpartition(".")[0]
        is_looked_up = module in _TOKEN_TABLES and module != model.output_table
        is_looked_up |= bool({"positions", "types"} & set(axes[path]))
        is_pooled = path.startswith("head.") and model.head.plan.pooling is not None
        if is_looked_up or is_pooled or is_scale(path):
            return False
        return jnp.ndim(params[path]) >= 2

    return sum(
        math.prod(p.shape) * share(path)
        for path, p in params.items()
        if is_matrix(path)
    )


def attention_flops(arch: Any, length: int) -> float:
    """FLOPs of attention's own products for one token, forward and backward.

    As Chowdhery et al. 2022 (PaLM, appendix B) count them: two products forward and
    four backward, each over all keys of the row, whatever the mask hides; a window
    counts as long as it is. Nothing recomputed counts.

    Args:
      arch: The model's numbers.
      length: Tokens of a row.
    """
    if hasattr(arch, "encoder"):
        # A decoder's layer attends to its own tokens, and to the encoder's.
        sides = (arch.encoder, 1), (arch.decoder, 2)
        return sum(
            12.0 * times * s.num_layers * s.num_heads * s.head_dim * length
            for s, times in sides
        )
    width = arch.num_heads * arch.head_dim
    windows = [getattr(k, "window", None) for k in getattr(arch, "kinds", ())]
    windows = windows or [None] * arch.num_layers
    return sum(12.0 * width * min(length, w or length) for w in windows)

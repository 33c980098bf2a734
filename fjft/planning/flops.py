"""Counts the FLOPs of a traced program, every turn of every loop."""

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

# Matrix products of queries and keys in cuDNN's kernels.
_CUDNN_PRODUCTS = {
    "dot_product_attention_fwd_wrapper": 2,
    "dot_product_attention_bwd_wrapper": 5,
}


def count_flops(jaxpr: Any, rates: Mapping[str, float] | None = None) -> float:
    """FLOPs of all matrix products, over all devices; a multiply-add is two.

    A scan counts as often as it turns, a kernel as its author says or else as often
    as its grid has cells, cuDNN's attention over whole rows, and a conditional as its
    dearest branch. What is not a matrix product does not count: it is a percent or two,
    and runs on other units.

    Args:
      jaxpr: From `jax.jit(...).trace(...)` or `jax.make_jaxpr`.
      rates: How many times as fast products of `int8` or `fp8` are done; they count
        so many times less.
    """
    if isinstance(jaxpr, ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    return sum(_count(eqn, rates or {}) for eqn in jaxpr.eqns)


def _count(eqn: Any, rates: Mapping[str, float]) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        return _dot_flops(eqn) / rates.get(_narrow_type(eqn), 1.0)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        layout = params["dimension_numbers"].rhs_spec
        per_output = math.prod(kernel) / kernel[layout[0]]
        return 2.0 * math.prod(eqn.outvars[0].aval.shape) * per_output
    if name in _CUDNN_PRODUCTS:
        (B, T, N, H), (_, S, *_) = (x.aval.shape for x in eqn.invars[:2])
        return _CUDNN_PRODUCTS[name] * 2.0 * B * T * S * N * H
    if name == "pallas_call":
        if params.get("cost_estimate") is not None:
            return float(params["cost_estimate"].flops)
        cells = math.prod(n for n in params["grid_mapping"].grid if isinstance(n, int))
        return cells * count_flops(params["jaxpr"], rates)
    if name == "jit" and not eqn.outvars:
        # A kernel that a remat policy saved: the trace keeps it, the compiler does not.
        return 0.0
    leaves = jax.tree.leaves(params, is_leaf=_is_jaxpr)
    inside = [count_flops(leaf, rates) for leaf in leaves if _is_jaxpr(leaf)]
    if name == "cond":
        return max(inside)
    turns = params["length"] if name == "scan" else 1
    if name == "shard_map":
        turns = params["mesh"].size
    return turns * sum(inside)


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, ClosedJaxpr | Jaxpr)


def _dot_flops(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    depth = math.prod(left[axis] for axis in contracted)
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * depth


def _narrow_type(eqn: Any) -> str:
    dtype = eqn.invars[0].aval.dtype.name
    return "fp8" if dtype.startswith("float8") else dtype

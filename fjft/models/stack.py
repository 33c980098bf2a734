"""A family's layers, stacked and scanned, and what the backward pass keeps of them."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from fjft.models.attention import ATTENTION
from fjft.models.bits import as_bits, as_numbers
from fjft.models.cudnn import is_kernel
from fjft.models.layers import Maker, Shared

HIDDEN_STATES = "hidden_states"  # what remat policies call the input of a layer


def plan_stack(
    kinds: Sequence[Hashable], cuts: Sequence[int] = ()
) -> list[list[list[int]]]:
    """Groups layers into the fewest scans.

    Layers that differ in what the compiler must know (a window, say) cannot share a
    scanned body, but a repeating pattern of them can be one body.

    Args:
      kinds: What the compiler must know of each layer.
      cuts: Layer numbers at which a new scan must start (for freezing a part).

    Returns:
      Runs, each a list of blocks, each the list of layers stacked in it. With kinds
      `s s f s s f s`, the runs are `[[0, 3], [1, 4], [2, 5]]` and `[[6]]`.
    """
    runs = []
    edges = sorted({0, len(kinds), *(c for c in cuts if 0 < c < len(kinds))})
    for edge, stop in itertools.pairwise(edges):
        start = edge
        while start < stop:
            period, repeats = _longest_repeat(kinds[start:stop])
            end = start + period * repeats
            runs.append([list(range(start + m, end, period)) for m in range(period)])
            start = end
    return runs


def _longest_repeat(kinds: Sequence[Hashable]) -> tuple[int, int]:
    """The period whose repeats, counted from the start, cover the most layers."""
    best = (1, 1)
    for period in range(1, len(kinds) // 2 + 1):
        repeats = 1
        pattern = kinds[:period]
        while kinds[repeats * period : (repeats + 1) * period] == pattern:
            repeats += 1
        if repeats > 1 and period * repeats > best[0] * best[1]:
            best = (period, repeats)
    return best


class Stack(nnx.Module):
    """A family's layers, stacked and scanned, so that compile time stays flat in depth.

    Attributes:
      blocks: Modules whose parameters have a leading axis over the layers they hold.
      layers: For each block, the numbers of its layers in the checkpoint.
      runs: The blocks that are scanned together, in order of execution.
    """

    def __init__(
        self,
        make: Maker,
        make_block: Callable[[Maker, Any], nnx.Module],
        kinds: Sequence[Hashable],
        cuts: Sequence[int] = (),
    ):
        plan = plan_stack(kinds, cuts)
        flat = [layers for run in plan for layers in run]
        self.blocks = nnx.List(
            make_block(dataclasses.replace(make, stack=(len(ls),)), kinds[ls[0]])
            for ls in flat
        )
        self.layers = tuple(tuple(layers) for layers in flat)
        self.runs = tuple(
            tuple(i for i, layers in enumerate(flat) if layers in run) for run in plan
        )

    def scan(
        self,
        body: Callable[[nnx.Module, Any, jax.Array], Any],
        carry: Any,
        remat: Callable[[Callable], Callable] = lambda f: f,
        forward_only: bool = False,
    ) -> Any:
        """Runs `carry = body(block, carry, layer)` over all layers, in order.

        Args:
          body: Applies one layer; `layer` is its number, a traced int32 scalar.
          carry: Any pytree, of the same shapes in and out.
          remat: Wraps the body, to choose what the backward pass recomputes.
          forward_only: Nothing is differentiated, so that layers may be cut out of
            their stacks in whatever form is fastest.
        """
        for run in self.runs:
            graphdefs, shared, states = zip(
                *(nnx.split(self.blocks[i], Shared, ...) for i in run), strict=True
            )
            numbers = jnp.array([self.layers[i] for i in run], jnp.int32).T
            states = as_bits(states) if forward_only else states

            def step(carry, xs, graphdefs=graphdefs, shared=shared):
                states, numbers = as_numbers(xs) if forward_only else xs
                carry = jax.tree.map(_name_hidden_states, carry)
                for m, (graphdef, *parts) in enumerate(
                    zip(graphdefs, shared, states, strict=True)
                ):
                    carry = body(nnx.merge(graphdef, *parts), carry, numbers[m])
                return carry, None

            carry, _ = jax.lax.scan(remat(step), carry, (states, numbers))
        return carry


def _name_hidden_states(x: jax.Array) -> jax.Array:
    """Names what runs from layer to layer, leaving out sums over tokens."""
    return checkpoint_name(x, HIDDEN_STATES) if x.ndim >= 3 else x


def _remat(policy: Callable | None) -> Callable[[Callable], Callable]:
    return functools.partial(jax.checkpoint, prevent_cse=False, policy=policy)


_POLICIES = jax.checkpoint_policies
_KEEPS_ATTENTION = _POLICIES.save_from_both_policies(
    _POLICIES.save_only_these_names(ATTENTION), is_kernel
)

# What the backward pass has kept of a layer; it works the rest out again.
REMAT_POLICIES: dict[str, Callable[[Callable], Callable]] = {
    # Everything.
    "none": lambda f: f,
    # What the layer read.
    "full": _remat(None),
    # That, and what attention gave, which costs the most to work out again.
    "attention": _remat(_KEEPS_ATTENTION),
    # That, and what matrix products gave.
    "dots": _remat(
        _POLICIES.save_from_both_policies(_POLICIES.dots_saveable, _KEEPS_ATTENTION)
    ),
    # What the layer read, in the memory of the host.
    "offload": _remat(
        _POLICIES.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[HIDDEN_STATES],
            offload_src="device",
            offload_dst="pinned_host",
        )
    ),
}

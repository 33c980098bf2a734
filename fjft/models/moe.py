"""Routed experts: who goes where, what they compute, and how evenly they are used.

Shazeer et al. 2017; Fedus et al. 2022 (the balance); axis E is experts.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from fjft.models.layers import ACTIVATIONS, GatedMLP, Linear, Maker, normal
from fjft.sharding import sequence_shards, spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """The numbers of a layer's routed experts.

    Attributes:
      count: Experts in a layer.
      per_token: Experts that each token goes to.
      intermediate_size: The width of each.
      shared_size: The width of the expert that every token goes to; None is none.
      normalize: Whether the weights of a token's experts are scaled to sum to 1.
      balance_coefficient: What `balance_loss` is multiplied by before it joins the
        loss.
    """

    count: int
    per_token: int
    intermediate_size: int
    shared_size: int | None
    normalize: bool
    balance_coefficient: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Load:
    """How layers used their experts, summed over layers and tokens that are real.

    Attributes:
      chosen: For each expert, the tokens that went to it, float32.
      probabilities: For each expert, the router's probabilities, float32.
      tokens: Tokens, counted once a layer.
    """

    chosen: Float[Array, "E"]
    probabilities: Float[Array, "E"]
    tokens: Float[Array, ""]


def no_load(experts: Experts) -> Load:
    """The load of no tokens."""
    zeros = jnp.zeros((experts.count,), jnp.float32)
    return Load(zeros, zeros, jnp.zeros((), jnp.float32))


def balance_loss(load: Load) -> Float[Array, ""]:
    """1 per expert a token when all are used alike, more when some are used more.

    It is `E * sum(share of tokens * mean probability)` (Fedus et al. 2022, equations
    4 to 6), over all layers at once, as `load_balancing_loss_func` of transformers.
    """
    tokens = jnp.maximum(load.tokens, 1)
    shares = load.chosen / tokens * (load.probabilities / tokens)
    return load.chosen.size * jnp.sum(shares)


class Router(nnx.Module):
    """Scores the experts for each token."""

    def __init__(self, make: Maker, size: int, experts: Experts, *, std: float):
        self.weight = make((experts.count, size), ("router", "embed"), normal(std))
        self.experts = experts

    def __call__(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T E"], Float[Array, "B T k"], Int[Array, "B T k"]]:
        """All probabilities, and the weights and numbers of each token's experts."""
        scores = jnp.einsum("BTD,ED->BTE", x, self.weight[...].astype(x.dtype))
        probs = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
        weights, chosen = jax.lax.top_k(probs, self.experts.per_token)
        if self.experts.normalize:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return probs, weights.astype(x.dtype), chosen


class ExpertMLPs(nnx.Module):
    """`count` gated MLPs side by side; each has a matrix of its own in a checkpoint."""

    def __init__(
        self, make: Maker, size: int, experts: Experts, activation: str, *, std: float
    ):
        widen = (experts.count, experts.intermediate_size, size)
        narrow = (experts.count, size, experts.intermediate_size)
        self.gate = make(widen, ("expert", "mlp", "embed"), normal(std))
        self.up = make(widen, ("expert", "mlp", "embed"), normal(std))
        self.down = make(narrow, ("expert", "embed", "mlp"), normal(std))
        self.activation = activation

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        weights_BTk: Float[Array, "B T k"],
        chosen_BTk: Int[Array, "B T k"],
    ) -> Float[Array, "B T D"]:
        """The weighted sum of what each token's experts say.

        On a mesh each device works with its own part of the experts, on the tokens of
        all devices it shares them with.
        """
        matrices = tuple(
            w[...].astype(x_BTD.dtype) for w in (self.gate, self.up, self.down)
        )
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return _apply_experts(
                x_BTD, weights_BTk, chosen_BTk, matrices, self.activation
            )
        along = "sequence" if sequence_shards(x_BTD.shape[1]) > 1 else None
        rows = spec(("batch", along, None))
        widen, narrow = (
            spec(("expert", "mlp", "embed")),
            spec(("expert", "embed", "mlp")),
        )
        return jax.shard_map(
            functools.partial(_apply_sharded, activation=self.activation),
            in_specs=(rows, rows, rows, (widen, widen, narrow)),
            out_specs=rows,
        )(x_BTD, weights_BTk, chosen_BTk, matrices)


def _apply_sharded(
    x: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    matrices: Sequence[jax.Array],
    *,
    activation: str,
) -> jax.Array:
    """One device's part: gathers tokens and weights, and shares out the results."""
    x, weights, chosen = (
        jax.lax.all_gather(y, "expert", axis=0, tiled=True)
        for y in (x, weights, chosen)
    )
    gate, up, down = (
        jax.lax.all_gather(w, "fsdp", axis=axis, tiled=True)
        for w, axis in zip(matrices, (2, 2, 1), strict=True)
    )
    first = jax.lax.axis_index("expert") * gate.shape[0]
    out = _apply_experts(x, weights, chosen - first, (gate, up, down), activation)
    out = jax.lax.psum_scatter(out, "expert", scatter_dimension=0, tiled=True)
    return jax.lax.psum(out, "tensor")


def _apply_experts(
    x_BTD: jax.Array,
    weights_BTk: jax.Array,
    chosen_BTk: jax.Array,
    matrices: Sequence[jax.Array],
    activation: str,
) -> jax.Array:
    """Sorts the tokens by expert, so that each product is one ragged one.

    The work is that of `per_token` experts a token however many there are. Experts
    that are not here, whose numbers lie outside of `[0, E)`, add nothing.
    """
    gate, up, down = matrices
    num_experts, per_token = gate.shape[0], chosen_BTk.shape[-1]
    x = x_BTD.reshape(-1, x_BTD.shape[-1])
    expert = chosen_BTk.reshape(-1)
    expert = jnp.where((expert >= 0) & (expert < num_experts), expert, num_experts)
    order = jnp.argsort(expert, stable=True)
    sizes = jnp.bincount(expert, length=num_experts + 1)[:-1].astype(jnp.int32)
    rows = x[order // per_token]
    hidden = ACTIVATIONS[activation](_ragged(rows, gate, sizes))
    out = _ragged(hidden * _ragged(rows, up, sizes), down, sizes)
    # Back to [token, choice].
    out = out[jnp.argsort(order)] * weights_BTk.reshape(-1, 1)
    out = jnp.sum(out.reshape(-1, per_token, out.shape[-1]), axis=1)
    return out.reshape(x_BTD.shape)


def _ragged(rows: jax.Array, weight_Eoi: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """`rows @ weight[e].T`, the first rows with expert 0, the next with 1, ..."""
    return jax.lax.ragged_dot(
        rows, weight_Eoi.swapaxes(1, 2), sizes_E, preferred_element_type=rows.dtype
    )


class SparseMLP(nnx.Module):
    """Routed experts in the place of an MLP, and the shared one beside them."""

    def __init__(
        self, make: Maker, size: int, experts: Experts, activation: str, *, std: float
    ):
        self.router = Router(make, size, experts, std=std)
        self.experts = ExpertMLPs(make, size, experts, activation, std=std)
        shared: Any = None
        shared_gate: Any = None
        if experts.shared_size is not None:
            shared = GatedMLP(
                make,
                size,
                experts.shared_size,
                activation=activation,
                bias=False,
                std=std,
            )
            shared_gate = Linear(
                make, "shared_gate", (1, size), ("router", "embed"), bias=False, std=std
            )
        self.shared, self.shared_gate = nnx.data(shared), nnx.data(shared_gate)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        real_BT: Array,
        rng: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "B T D"], Load]:
        """The output, and the load that the tokens of `real_BT` are."""
        probs, weights, chosen = self.router(x)
        out = self.experts(x, weights, chosen)
        if self.shared is not None and self.shared_gate is not None:
            out = out + jax.nn.sigmoid(self.shared_gate(x, rng)) * self.shared(x, rng)
        real = real_BT.astype(jnp.float32)
        is_chosen = jax.nn.one_hot(chosen, probs.shape[-1], dtype=jnp.float32)
        load = Load(
            chosen=jnp.einsum("BTkE,BT->E", is_chosen, real),
            probabilities=jnp.einsum("BTE,BT->E", probs, real),
            tokens=jnp.sum(real),
        )
        return out, load

"""AdaLoRA: low-rank adapters that share a budget of ranks (Zhang et al. 2023).

The change of a weight is `B diag(E) A`, a singular value decomposition in the making.
Training starts with more ranks than the budget allows, and takes away those triplets
(a row of A, an entry of E, a column of B) that matter least, wherever in the model they
are; `allocation.py` says when and which.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from fjft import tree
from fjft.distributed import fetch
from fjft.models.layers import Linear, Maker, Rngs, dropout
from fjft.models.weights import Site, module_at
from fjft.peft import allocation, existing, saved, targets
from fjft.peft.adalora_config import Config as Config
from fjft.peft.adalora_config import for_training, to_peft
from fjft.peft.adalora_config import from_peft as from_peft
from fjft.peft.lora_adapter import ADAPTER, Fixed
from fjft.peft.low_rank import add_to_weight, low_rank, matrix
from fjft.peft.rule import StepRule
from fjft.peft.targets import PeftTensor

PEFT_TYPE = "ADALORA"


class Adapter(nnx.Module):
    """Adds `scale * x @ (E * A).T @ B.T`.

    A layer of smaller rank than its neighbours in the stack, or one that is not adapted
    at all, has zeros in its spare rows of A and E and columns of B, which stay zero.

    Attributes:
      a: Float32[..., R, in], right singular vectors.
      e: Float32[..., R, 1], singular values.
      b: Float32[..., out, R], left singular vectors.
      scale: Float32[...].
      ranks: Each stacked layer's rank, None where it is not adapted; one entry where
        nothing is stacked.
      dropout: Share of the input that is dropped in training.
    """

    def __init__(
        self,
        rngs: Rngs,
        linear: Linear,
        ranks: tuple[int | None, ...],
        scale: float,
        dropout: float,
    ):
        out_axis, in_axis = linear.weight.get_metadata()["axes"][-2:]
        *stack, size_out, size_in = linear.weight.shape
        # An array of no rows at all would be a burden to everything that handles it.
        size = max(1, *(rank or 0 for rank in ranks))
        used = jnp.arange(size)[None] < jnp.array([r or 0 for r in ranks])[:, None]

        def vectors(axis: int) -> Callable[..., jax.Array]:
            def init(key: jax.Array, shape: tuple, dtype: Any) -> jax.Array:
                drawn = 0.02 * jax.random.normal(key, shape, dtype)
                there = jnp.expand_dims(used.reshape(*stack, size), axis)
                return jnp.where(there, drawn, 0)

            return init

        make = Maker(rngs, jnp.float32, tuple(stack))
        self.a = make((size, size_in), ("rank", in_axis), vectors(-1))
        self.e = make((size, 1), ("rank", None), jax.nn.initializers.zeros)
        self.b = make((size_out, size), (out_axis, "rank"), vectors(-2))
        self.scale = Fixed(
            jnp.full(tuple(stack), scale, jnp.float32), axes=("layers",) * len(stack)
        )
        self.ranks = ranks
        self.dropout = dropout

    def __call__(
        self, linear: Linear, x: Float[Array, "*B in"], rng: Key[Array, ""] | None
    ) -> Float[Array, "*B out"]:
        dropped = dropout(x, self.dropout, rng)
        scaled = self.e[...] * self.a[...]
        low = low_rank(dropped, scaled, self.b[...], self.scale[...])
        return linear.base(x) + low

    def merge(self, linear: Linear) -> None:
        """Changes the map so that it alone gives what map and adapter give."""
        scale = self.scale[...].reshape(*self.scale.shape, 1, 1)
        delta = matrix(self.e[...] * self.a[...], self.b[...])
        add_to_weight(linear, delta * scale)


cuts = existing.cuts


def attach(
    model: nnx.Module, sites: Sequence[Site], config: Config, rngs: Rngs
) -> None:
    """Puts an adapter into each targeted linear map.

    Raises:
      UserError: A pattern matches nothing, or cannot be had with tied embeddings.
    """
    linears = targets.linear_sites(model, sites)
    chosen = targets.select_linears(config.target_modules, linears)
    saved.paths(config.modules_to_save, sites)
    # PEFT divides by a rank that can be zero.
    scale = config.lora_alpha / (config.init_r + 1e-5)
    for site in linears:
        ranks = tuple(
            sum(config.kept(m)) if m in chosen else None for m in site.hf_modules
        )
        if any(rank is not None for rank in ranks):
            linear = module_at(model, site.module)
            adapter = Adapter(rngs, linear, ranks, scale, config.lora_dropout)
            linear.adapter = nnx.data(adapter)


def step_rule(
    model: nnx.Module, sites: Sequence[Site], config: Config, total_steps: int
) -> StepRule:
    """What AdaLoRA adds to the step of a run.

    Raises:
      UserError: The schedule does not fit the run.
    """
    adapters = {
        f"{site.module}{ADAPTER}": tuple(rank is not None for rank in adapter.ranks)
        for site, adapter in targets.adapters(model, sites)
    }
    return allocation.make_rule(for_training(config, total_steps), adapters)


def is_trainable(config: Config, sites: Sequence[Site]) -> Callable[[str], bool]:
    """Adapters' A, E and B, and what `modules_to_save` means."""
    whole = saved.paths(config.modules_to_save, sites)
    trained = tuple(f"{ADAPTER}{name}" for name in "aeb")
    return lambda path: path.endswith(trained) or path in whole


def num_trainable(model: nnx.Module, sites: Sequence[Site], config: Config) -> int:
    """The number of trained scalars, without the padding of unequal ranks."""
    adapters = sum(
        sum(rank or 0 for rank in adapter.ranks)
        * (adapter.a.shape[-1] + 1 + adapter.b.shape[-2])
        for _, adapter in targets.adapters(model, sites)
    )
    whole = saved.paths(config.modules_to_save, sites)
    return adapters + existing.count(model, whole)


def plain(model: Any, sites: Sequence[Site], config: Config) -> tuple[Any, Config]:
    """A model and its options as they are written: without triplets that do nothing.

    Once a budget has been allocated, the triplets that went have an E of exactly zero.
    All arrays are cut to the largest rank that is left in their stack. A model that is
    new, or was read from a file without such triplets, is given back as it is.
    """
    kept = {
        module: tuple(bool(x) for x in layer.ravel())
        for site, adapter in targets.adapters(model, sites)
        for module, rank, layer in zip(
            site.hf_modules, adapter.ranks, _nonzero(adapter), strict=True
        )
        if rank is not None
    }
    is_new = not any(map(any, kept.values()))
    if config.rank_pattern or is_new or all(map(all, kept.values())):
        return model, config
    model = tree.merge(*tree.split(model))
    for site, adapter in targets.adapters(model, sites):
        _cut(adapter, site.hf_modules, kept)
    return model, dataclasses.replace(config, rank_pattern=kept)


def _nonzero(adapter: Adapter) -> np.ndarray:
    """Bool [L, R]: which triplets do anything; one layer where nothing is stacked."""
    values = fetch(adapter.e[...]) != 0
    return values.reshape(len(adapter.ranks), -1)


def _cut(
    adapter: Adapter, modules: Sequence[str], kept: dict[str, tuple[bool, ...]]
) -> None:
    """Leaves the kept triplets of each layer, in their order, and as few rows as do."""
    unadapted = (False,) * adapter.e.shape[-2]
    stays = np.array([kept.get(module, unadapted) for module in modules])
    adapter.ranks = tuple(
        sum(kept[module]) if module in kept else None for module in modules
    )
    size = max(1, *stays.sum(axis=-1))
    order = np.argsort(~stays, axis=-1, kind="stable")[:, :size]
    is_used = np.take_along_axis(stays, order, axis=-1)
    for name, axis in (("a", -2), ("e", -2), ("b", -1)):
        param = getattr(adapter, name)
        value = param[...]
        shape = [*value.shape[:-2], 1, 1]
        shape[axis] = size
        rows = jnp.take_along_axis(value, jnp.asarray(order).reshape(shape), axis)
        rows = jnp.where(jnp.asarray(is_used).reshape(shape), rows, 0)
        setattr(adapter, name, nnx.Param(rows, axes=param.get_metadata()["axes"]))


def peft_config(
    model: nnx.Module, sites: Sequence[Site], config: Config
) -> dict[str, Any]:
    """The method's part of PEFT's `adapter_config.json`."""
    adapted = [
        module
        for site, adapter in targets.adapters(model, sites)
        for module, rank in zip(site.hf_modules, adapter.ranks, strict=True)
        if rank is not None
    ]
    whole = set(saved.modules(config.modules_to_save, sites).values())
    return to_peft(config) | {
        "target_modules": targets.peft_names(adapted, model, sites),
        "modules_to_save": sorted(whole) or None,
        "bias": "none",
        # PEFT's word for maps that lie the other way round in the base model.
        "fan_in_fan_out": any(s.transpose for s, _ in targets.adapters(model, sites)),
        "init_lora_weights": True,
    }


def peft_tensors(
    model: nnx.Module, sites: Sequence[Site], config: Config
) -> list[PeftTensor]:
    """PEFT's tensors, and the part of a parameter that each of them is."""
    table = []
    every = slice(None)
    for site, adapter in targets.adapters(model, sites):
        path = f"{site.module}{ADAPTER}"
        for i, rank in enumerate(adapter.ranks):
            if rank is None:
                continue
            layer, used = (i,) if site.lead else (), slice(rank)
            name = f"{targets.PEFT_PREFIX}{site.hf_modules[i]}"
            table += [
                PeftTensor(f"{name}.lora_A", f"{path}a", (*layer, used, every)),
                PeftTensor(f"{name}.lora_E", f"{path}e", (*layer, used, every)),
                PeftTensor(f"{name}.lora_B", f"{path}b", (*layer, every, used)),
            ]
    return table + saved.tensors(config.modules_to_save, sites)

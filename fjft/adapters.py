"""Several adapters on one base: load, choose, mix, and make one of them."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fjft import sharding, tree
from fjft.checkpoint import adapter as adapter_files
from fjft.errors import UserError
from fjft.models.layers import Rngs
from fjft.models.weights import Site, module_at
from fjft.options import check_name, make_section
from fjft.peft import combine, lora, several, targets
from fjft.peft.lora_adapter import Adapter


def load_adapters(model: Any, directories: Mapping[str, str | Path]) -> Any:
    """Puts several of PEFT's LoRA adapters on top of one model.

    Args:
      model: A model without adapters; left as it is, and its weights are shared.
      directories: PEFT directories by the names that the adapters get.

    Returns:
      A model in which the first adapter speaks; see `set_adapters`.

    Raises:
      UserError: There are none, the model has adapters already, or one is no plain
        LoRA adapter of it.
    """
    provenance = model.provenance
    if provenance.method is not None or not directories:
        raise UserError(
            "load_adapters needs a model without adapters, and at least one directory"
        )
    adapted = {n: _with_adapter(model, n, d) for n, d in directories.items()}
    joined = several.join(model, adapted, provenance.sites)
    shardings, params = _shardings(joined, model), tree.split(joined)[1]
    tree.update(joined, jax.device_put(params, shardings))
    joined.provenance = provenance
    return joined


def _shardings(adapted: Any, model: Any) -> dict[str, Any]:
    """How a model's parameters lie on the devices of another."""
    mesh = next(iter(tree.split(model)[1].values())).sharding.mesh
    shapes = {path: p.shape for path, p in tree.split(adapted)[1].items()}
    return sharding.param_shardings(tree.logical_axes(adapted), shapes, mesh)


def _with_adapter(model: Any, name: str, directory: str | Path) -> Any:
    provenance = model.provenance
    described = adapter_files.read_adapter_config(directory)
    check_name(f"peft_type of adapter {name!r}", described.get("peft_type"), ("LORA",))
    config = lora.from_peft(described)
    copy = tree.merge(*tree.split(model))
    lora.attach(copy, provenance.sites, config, Rngs(0))
    modules = list(targets.adapters(copy, provenance.sites))
    if (
        config.modules_to_save
        or config.has_start
        or config.is_loftq
        or any(
            targets.is_head(site)
            or not isinstance(adapter, Adapter)
            or adapter.magnitude is not None
            for site, adapter in modules
        )
    ):
        raise UserError(
            f"adapter {name!r} changes more than the layers' maps by low-rank parts "
            "(DoRA, a start from the weights, embeddings, an output head, modules "
            "trained whole), so it cannot stand beside others; load it alone"
        )
    params = tree.split(copy)[1]
    stored = adapter_files.load_adapter_params(
        copy,
        dataclasses.replace(provenance, method=lora, peft_config=config),
        params,
        _shardings(copy, model),
        directory,
    )
    tree.update(copy, stored)
    return copy


def set_adapters(
    model: Any,
    choice: several.Choice = None,
    *,
    rows: Sequence[str | None] | None = None,
) -> None:
    """Chooses which of a model's adapters speak; changes the model in place.

    Args:
      model: What `load_adapters` gave.
      choice: The name of one; names of several, which are added up; weights by name,
        for a weighted sum; None for the base alone.
      rows: Instead, the adapter of each row of the batches to come, None for none.

    Raises:
      UserError: The model has no such adapter.
    """
    if rows is None:
        several.choose(model, choice)
    elif choice is None:
        several.choose_rows(model, rows)
    else:
        raise UserError("give set_adapters one of choice and rows, not both")


def combine_adapters(model: Any, weights: Mapping[str, float], **options: Any) -> Any:
    """A model with one LoRA adapter made of several, to save or to merge.

    Args:
      model: What `load_adapters` gave; left as it is.
      weights: Of each adapter by name.
      **options: Of `peft.combine.Config`: `combination_type`, `density`, ...

    Raises:
      UserError: The model has no such adapter, none is named, or an option is wrong.
    """
    if not weights:
        raise UserError("combine_adapters was given no adapters; name at least one")
    config = make_section(combine.Config, "combine_adapters", options)
    rng = np.random.default_rng(config.seed)
    next(several.several_of(model))
    found: dict[str, list] = {}
    combined = tree.merge(*tree.split(model))
    linears = targets.linear_sites(model, model.provenance.sites)
    adapted = [s for s in linears if module_at(model, s.module).adapter is not None]
    for site in adapted:
        module = module_at(model, site.module).adapter
        for name in weights:
            check_name("adapter", name, module.names)
        found[site.module] = [
            combine.combine(parts, config, rng) if parts else None
            for parts in _parts(module, weights)
        ]
    rank = max(len(ab[0]) for layers in found.values() for ab in layers if ab)
    names = []
    for site in adapted:
        linear = module_at(combined, site.module)
        linear.adapter = _plain_adapter(linear, found[site.module], rank)
        names += _adapted_names(site, found[site.module])
    combined.provenance = dataclasses.replace(
        model.provenance,
        method=lora,
        peft_config=lora.Config(
            r=rank, lora_alpha=rank, target_modules="|".join(map(re.escape, names))
        ),
    )
    return combined


def _parts(
    module: several.Several, weights: Mapping[str, float]
) -> list[list[combine.Part]]:
    """For each stacked layer, the adapters that it has."""
    num_layers = len(module.ranks[0])
    a, b, scale = (
        np.asarray(x[...]).reshape(num_layers, len(module.names), *x.shape[start:])
        for x, start in (
            (module.a, module.a.ndim - 2),
            (module.b, module.b.ndim - 2),
            (module.scale, module.scale.ndim),
        )
    )
    numbers = [(module.names.index(name), weight) for name, weight in weights.items()]
    return [
        [
            combine.Part(
                a[layer, n, :r], b[layer, n, :, :r], weight * float(scale[layer, n])
            )
            for n, weight in numbers
            if (r := module.ranks[n][layer])
        ]
        for layer in range(num_layers)
    ]


def _plain_adapter(linear: Any, found: list, rank: int) -> Any:
    """An adapter of scale 1 with these A and B of each stacked layer."""
    *stack, size_out, size_in = linear.weight.shape
    a = np.zeros((len(found), rank, size_in), np.float32)
    b = np.zeros((len(found), size_out, rank), np.float32)
    for layer, ab in enumerate(found):
        if ab is not None:
            a[layer, : len(ab[0])], b[layer, :, : len(ab[0])] = ab
    ranks = tuple(0 if ab is None else rank for ab in found)
    if not any(ranks):
        return nnx.data(None)
    scales = tuple(float(r > 0) for r in ranks)
    adapter = Adapter(Rngs(0), linear, ranks, scales)
    adapter.a[...] = jnp.asarray(a.reshape(*stack, rank, size_in))
    adapter.b[...] = jnp.asarray(b.reshape(*stack, size_out, rank))
    return nnx.data(adapter)


def _adapted_names(site: Site, found: list) -> list[str]:
    return [m for m, ab in zip(site.hf_modules, found, strict=True) if ab is not None]

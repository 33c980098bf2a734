"""LoRA: low-rank adapters beside frozen linear maps (Hu et al. 2021).

And what grew from it: rsLoRA, DoRA, and starts from the weight itself.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fjft import tree
from fjft.errors import UserError
from fjft.models.layers import Embedding, Linear, Rngs, TiedHead
from fjft.models.quantized import Quantized
from fjft.models.weights import Site, module_at
from fjft.peft import existing, saved, starts, targets
from fjft.peft.lora_adapter import ADAPTER, Adapter
from fjft.peft.lora_config import LOFTQ_KEY
from fjft.peft.lora_config import Config as Config
from fjft.peft.lora_config import from_peft as from_peft
from fjft.peft.lora_embedding import TableAdapter
from fjft.peft.targets import PeftTensor

PEFT_TYPE = "LORA"


cuts = existing.cuts


def attach(
    model: nnx.Module, sites: Sequence[Site], config: Config, rngs: Rngs
) -> None:
    """Puts an adapter beside each targeted linear map and table of tokens.

    Raises:
      UserError: A pattern matches nothing, or means what these options do not suit.
    """
    could = targets.low_rank_sites(model, sites)
    chosen = targets.select_linears(config.target_modules, could, adapts_head=True)
    saved.paths(config.modules_to_save, sites)
    for site in could:
        modules = site.hf_modules
        ranks = tuple(config.rank(m) if m in chosen else 0 for m in modules)
        if not any(ranks):
            continue
        scales = tuple(config.scale(m) if m in chosen else 0.0 for m in modules)
        module = module_at(model, site.module)
        if isinstance(module, Embedding):
            _check_plain(modules[0], config.use_dora or config.has_start, config)
            is_tied = bool(targets.tied_names(site))
            adapter = TableAdapter(rngs, module, *ranks, *scales, is_tied=is_tied)
        else:
            linear = module
            if targets.is_head(site):
                _check_plain(modules[0], config.use_dora, config)
            if isinstance(module, TiedHead):
                _check_plain(modules[0], config.has_start, config)
                linear = module_at(model, targets.head_table(sites).module)
            begin = _begin(linear, config)
            most = min(linear.weight.shape[-2:])
            if begin != starts.DEFAULT and max(ranks) > most:
                raise UserError(
                    f"peft.init_lora_weights={config.init_lora_weights!r} takes the "
                    f"rank {max(ranks)} of {modules[0]} from its weight, which has "
                    f"{most}; set peft.r, or its entry of peft.rank_pattern, to {most} "
                    "or less"
                )
            adapter = Adapter(
                rngs,
                linear,
                ranks,
                scales,
                dropout=config.lora_dropout,
                begin=begin,
                use_dora=config.use_dora,
            )
        module.adapter = nnx.data(adapter)
    if config.is_loftq and _loftq(model, sites) is None:
        raise UserError(
            f"peft.init_lora_weights={config.init_lora_weights!r} starts from what "
            "quantization took away, and no targeted map is quantized; set "
            "model.quantization=nf4, or where an adapter is loaded quantization"
        )


def _begin(linear: Any, config: Config) -> str:
    """How the adapter of a map starts: by LoftQ only if that lies in codes.

    Raises:
      UserError: It is for codes of another format.
    """
    if not config.is_loftq:
        return config.init_lora_weights
    if not isinstance(linear.weight, Quantized):
        return starts.DEFAULT
    begin = f"{starts.LOFTQ}_{linear.weight.format}"
    if config.init_lora_weights not in (starts.LOFTQ, begin):
        raise UserError(
            f"peft.init_lora_weights={config.init_lora_weights!r} is not for a base in "
            f"{linear.weight.format}; set model.quantization to the format in its name"
        )
    return begin


def _loftq(model: nnx.Module, sites: Sequence[Site]) -> str | None:
    """By which LoftQ the adapters start, if they do."""
    begins = (getattr(a, "begin", "") for _, a in targets.adapters(model, sites))
    return next(filter(starts.is_loftq, begins), None)


def _check_plain(module: str, is_other: bool, config: Config) -> None:
    """Refuses what a table of tokens, or the head, cannot have."""
    if is_other:
        raise UserError(
            f"peft.target_modules={config.target_modules!r} means {module}, which has "
            "plain LoRA only; set peft.use_dora=False and "
            "peft.init_lora_weights=default, or leave it out"
        )


def start(
    model: nnx.Module,
    sites: Sequence[Site],
    config: Config,
    read: Callable[[Site], jax.Array],
) -> None:
    """Sets what depends on the base's weights, where they lie, a layer at a time."""
    if not (config.has_start or config.is_loftq or config.use_dora):
        return
    for site, adapter in targets.adapters(model, sites):
        linear = module_at(model, site.module)
        if not isinstance(linear, Linear):
            continue
        graphdef, params = tree.split(linear)
        shardings = {
            path: param.sharding
            for path, param in params.items()
            if path.startswith(ADAPTER[1:])
        }
        begin = jax.jit(_start, static_argnums=0, out_shardings=shardings)
        ranks = jnp.array(adapter.ranks, jnp.int32)
        ranks = ranks if site.lead else ranks[0]
        whole = read(site) if starts.is_loftq(adapter.begin) else None
        tree.update(linear, begin(graphdef, params, ranks, whole))


def _start(
    graphdef: nnx.GraphDef,
    params: tree.Params,
    ranks: jax.Array,
    whole: jax.Array | None,
) -> tree.Params:
    """The adapter's parameters at the start, of one map or of a stack of them."""

    def start_one(layer: tuple[tree.Params, jax.Array, Any]) -> tree.Params:
        params, rank, whole = layer
        linear = tree.merge(graphdef, params)
        linear.adapter.start(linear, rank, whole)
        started = tree.split(linear)[1]
        return {p: x for p, x in started.items() if p.startswith(ADAPTER[1:])}

    if not ranks.ndim:
        return start_one((params, ranks, whole))
    # One after the other, for the workspace of a decomposition is several weights.
    return jax.lax.map(start_one, (params, ranks, whole))


def plain(model: Any, sites: Sequence[Site], config: Config) -> tuple[Any, Config]:
    """A model and its options as they are written: on top of the base as it was.

    An adapter that started with a part of the weight becomes one of twice the rank, as
    PEFT's `path_initial_model_for_weight_conversion` makes it.
    """
    if not config.has_start:
        return model, config
    model = tree.merge(*tree.split(model))
    for site, adapter in targets.adapters(model, sites):
        module_at(model, site.module).adapter = nnx.data(adapter.plain())
    return model, config.plain()


def is_trainable(config: Config, sites: Sequence[Site]) -> Callable[[str], bool]:
    """Adapters' A, B and magnitudes, and what `modules_to_save` means."""
    whole = saved.paths(config.modules_to_save, sites)
    trained = tuple(f"{ADAPTER}{name}" for name in ("a", "b", "magnitude"))
    return lambda path: path.endswith(trained) or path in whole


def rate(config: Config, path: str, num_axes: int, learning_rate: float) -> float:
    """What a trained parameter's learning rate is multiplied by, as by PEFT's LoRA+.

    Args:
      config: The options.
      path: The parameter's.
      num_axes: The number of axes that it has in one layer.
      learning_rate: The optimizer's.
    """
    if targets.is_of_table(path):
        return (config.loraplus_lr_embedding or learning_rate) / learning_rate
    is_b = path.endswith(f"{ADAPTER}b")
    return config.loraplus_lr_ratio if is_b or num_axes == 1 else 1.0


def num_trainable(model: nnx.Module, sites: Sequence[Site], config: Config) -> int:
    """The number of trained scalars, without the padding of unequal ranks."""
    total = 0
    for _, adapter in targets.adapters(model, sites):
        size_out, size_in = adapter.b.shape[-2], adapter.a.shape[-1]
        total += sum(adapter.ranks) * (size_out + size_in)
        if config.use_dora:
            total += sum(rank > 0 for rank in adapter.ranks) * size_out
    whole = saved.paths(config.modules_to_save, sites)
    return total + existing.count(model, whole)


def peft_config(
    model: nnx.Module, sites: Sequence[Site], config: Config
) -> dict[str, Any]:
    """The method's part of PEFT's `adapter_config.json`."""
    adapted = [
        module
        for site, adapter in targets.adapters(model, sites)
        for module, rank in zip(site.hf_modules, adapter.ranks, strict=True)
        if rank
    ]
    modules = set(saved.modules(config.modules_to_save, sites).values())
    begin = _loftq(model, sites)
    return {
        **({LOFTQ_KEY: begin} if begin else {}),
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "target_modules": targets.peft_names(adapted, model, sites),
        "modules_to_save": sorted(modules) or None,
        "bias": "none",
        # PEFT's word for maps that lie the other way round in the base model.
        "fan_in_fan_out": any(s.transpose for s, _ in targets.adapters(model, sites)),
        "init_lora_weights": True,
        "use_dora": config.use_dora,
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
            if not rank:
                continue
            layer, used = (i,) if site.lead else (), slice(rank)
            is_table = isinstance(adapter, TableAdapter)
            name_a, name_b = (
                f"lora_embedding_{x}" if is_table else f"lora_{x}.weight" for x in "AB"
            )
            parts: dict[str, tuple[str, tuple]] = {
                name_a: ("a", (*layer, used, every)),
                name_b: ("b", (*layer, every, used)),
            }
            if config.use_dora:
                parts["lora_magnitude_vector"] = ("magnitude", layer)
            name = f"{targets.PEFT_PREFIX}{site.hf_modules[i]}"
            table += [
                PeftTensor(f"{name}.{leaf}", path + param, index)
                for leaf, (param, index) in parts.items()
            ]
    return table + saved.tensors(config.modules_to_save, sites)

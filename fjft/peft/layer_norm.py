"""Trains norms alone (Zhao et al. 2023, "Tuning LayerNorm in attention")."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import nnx

from fjft.models.weights import Site
from fjft.peft import existing, options, saved, targets
from fjft.peft.targets import PeftTensor

PEFT_TYPE = "LN_TUNING"
ALL_NORMS = "all-norms"


@dataclasses.dataclass(frozen=True)
class Config:
    """Options, under PEFT's names.

    Attributes:
      target_modules: `all-norms`, or a regex on Hugging Face module names.
      modules_to_save: A regex on names of modules that are trained whole; "" is none.
    """

    target_modules: str = ALL_NORMS
    modules_to_save: str = ""


cuts, attach = existing.cuts, existing.attach


def is_trainable(config: Config, sites: Sequence[Site]) -> Callable[[str], bool]:
    """The norms, and what `modules_to_save` means.

    Raises:
      UserError: A pattern matches nothing, or means some layers of a stack only.
    """
    return _paths(config, sites).__contains__


def _norms(config: Config, sites: Sequence[Site]) -> list[Site]:
    norms = [site for site in sites if site.module.endswith("norm")]
    if config.target_modules == ALL_NORMS:
        return norms
    names = [module for site in norms for module in site.hf_modules]
    chosen = targets.select(config.target_modules, names, "peft.target_modules")
    return targets.whole_stacks(
        chosen, norms, f"peft.target_modules={config.target_modules!r}"
    )


def _paths(config: Config, sites: Sequence[Site]) -> frozenset[str]:
    norms = frozenset(site.path for site in _norms(config, sites))
    return norms | saved.paths(config.modules_to_save, sites)


def num_trainable(model: nnx.Module, sites: Sequence[Site], config: Config) -> int:
    """The number of trained scalars."""
    return existing.count(model, _paths(config, sites))


def peft_config(
    model: nnx.Module, sites: Sequence[Site], config: Config
) -> dict[str, Any]:
    """What PEFT's `adapter_config.json` says of the method."""
    del model
    norms = {m for site in _norms(config, sites) for m in site.hf_modules}
    whole = saved.modules(config.modules_to_save, sites).values()
    return {
        "target_modules": targets.short_names(norms, sites),
        "modules_to_save": sorted(set(whole)) or None,
    }


def peft_tensors(
    model: nnx.Module, sites: Sequence[Site], config: Config
) -> list[PeftTensor]:
    """PEFT's tensors, and the part of a parameter that each of them is."""
    del model
    table = []
    for site in _norms(config, sites):
        leaf = site.path.rpartition(".")[2]
        for i, module in enumerate(site.hf_modules):
            name = f"{targets.PEFT_PREFIX}{module}.ln_tuning_layers.{leaf}"
            table.append(PeftTensor(name, site.path, (i,) if site.lead else ()))
    return table + saved.tensors(config.modules_to_save, sites)


def from_peft(adapter_config: Mapping[str, Any]) -> Config:
    """The options that an `adapter_config.json` stands for.

    Raises:
      UserError: It uses a part of PEFT's LN tuning that is not implemented.
    """
    patterns = "target_modules", "modules_to_save"
    return options.read(Config, adapter_config, patterns=patterns)

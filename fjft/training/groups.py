"""How each parameter is updated, where it is not as all others are.

What torch says by groups of parameters is said here parameter by parameter.
"""

import re
from collections.abc import Iterable

import numpy as np

from fjft.blueprint import Blueprint
from fjft.errors import UserError
from fjft.experiment import Experiment
from fjft.models.heights import find_heights

# Those of transformers' Trainer, on names in lower case.
_NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(^|\.)norm(\.|$)|_norm(\.|$)")


def find_decayed(
    e: Experiment, blueprint: Blueprint, paths: Iterable[str]
) -> dict[str, bool]:
    """Which parameters decay, as transformers' Trainer finds it by their names there.

    Biases and norms do not, a table of relative biases among them.

    Args:
      e: The config.
      blueprint: The model.
      paths: Those of the trained parameters.
    """
    names: dict[str, str] = {}
    if hasattr(e.method, "peft_tensors"):
        tensors = e.method.peft_tensors(blueprint.model, blueprint.sites, e.peft)
        names = {tensor.path: tensor.name for tensor in tensors}
    is_norm = {site.path: site.module.endswith("norm") for site in blueprint.sites}
    names |= {site.path: site.hf_names[0] for site in blueprint.sites}
    return {
        path: not is_norm.get(path)
        and not _NOT_DECAYED.search(names.get(path, path).lower())
        for path in paths
    }


def find_rates(
    e: Experiment, blueprint: Blueprint, stack_axes: dict[str, int]
) -> dict[str, float | np.ndarray] | None:
    """What each parameter's learning rate is multiplied by; None if nothing is.

    The method may say so, and `optimizer.layer_decay` does: it is taken once for each
    layer's step from the output, in a stack as an array that stands against its axes.

    Args:
      e: The config.
      blueprint: The model.
      stack_axes: How many leading axes of each trained parameter are a stack's.

    Raises:
      UserError: Layers of one parameter have different rates, but are to be updated
        one by one.
    """
    decay, options = e.optimizer.layer_decay, e.optimizer
    if decay == 1 and not hasattr(e.method, "rate"):
        return None
    if decay != 1 and options.offload:
        raise UserError(
            f"optimizer.layer_decay={decay:g} does not go with optimizer.offload=True; "
            "use one of them"
        )
    heights = find_heights(blueprint.model, blueprint.params)
    rates: dict[str, float | np.ndarray] = {}
    for path, stacked in stack_axes.items():
        num_axes = len(blueprint.params[path].shape)
        rates[path] = 1.0
        if hasattr(e.method, "rate"):
            single = num_axes - stacked
            rates[path] = e.method.rate(e.peft, path, single, options.learning_rate)
        if decay != 1:
            shape = heights[path].shape + (1,) * (num_axes - heights[path].ndim)
            scale = np.float32(decay) ** heights[path].astype(np.float32)
            rates[path] = rates[path] * scale.reshape(shape)
    return rates

"""The one place where names in a config become objects."""

import dataclasses
import importlib.util
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from fjft import data, sharding
from fjft.checkpoint import orbax
from fjft.errors import UserError
from fjft.experiment import EvaluateConfig, Experiment, ModelConfig, TrainConfig
from fjft.objectives.objectives import OBJECTIVES
from fjft.optimize import optimizer
from fjft.optimize.optimizer import OPTIMIZERS
from fjft.optimize.schedule import SCHEDULES
from fjft.options import check_name, check_type, did_you_mean, make_section
from fjft.peft.methods import METHODS

# Options that decide which others their section has: default, and table of modules.
CHOICES = {
    "peft.method": ("full", METHODS),
    "objective.name": ("causal_lm", OBJECTIVES),
}


def load_config(
    path: str, overrides: Mapping[str, Any] | None = None
) -> ml_collections.ConfigDict:
    """Loads a config file.

    Args:
      path: `configs/x.py`, or `configs/x.py:smoke` to pass `get_config` an argument.
      overrides: Values by dotted key: `{"train.max_steps": 10}`.

    Raises:
      UserError: No such file, no `get_config` in it or none that takes the
        argument, or an unknown key.
    """
    file, _, argument = str(path).partition(":")
    if not Path(file).is_file():
        raise UserError(f"no config file {file!r}; see configs/ for some")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None:
        raise UserError(f"config file {file!r} is no Python file; name it *.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{file} defines no function get_config(arg='')")
    try:
        config = module.get_config(argument)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    override(config, overrides or {})
    return config


def override(config: ml_collections.ConfigDict, values: Mapping[str, Any]) -> None:
    """Sets options by dotted key, in place, also those that the config leaves out.

    Where `peft.method` or `objective.name` becomes another, the old one's options that
    the new one does not have are dropped.

    Raises:
      UserError: A key is unknown, or a value is of the wrong type.
    """
    # Choices first: they decide which options there are.
    for key in sorted(values, key=lambda key: key not in CHOICES):
        check_type(key, values[key], option_type(config, key))
        # The name of an entry of a mapping may have dots of its own.
        section, option, *entry = key.split(".", 2)
        if section not in config:
            with config.unlocked():
                config[section] = ml_collections.ConfigDict()
        node: Any = config[section]
        value = values[key]
        if entry:
            old = node.get(option)
            old = old if isinstance(old, ml_collections.ConfigDict) else {}
            value = ml_collections.ConfigDict(
                {**old, entry[0]: value}, allow_dotted_keys=True
            )
        with node.unlocked(), node.ignore_type():
            node[option] = value
        if key in CHOICES:
            known = option_types(config.to_dict())
            for name in [n for n in node if f"{section}.{n}" not in known]:
                del node[name]


def option_type(config: ml_collections.ConfigDict, key: str) -> Any:
    """The type of the option with this dotted key.

    Raises:
      UserError: There is no such option.
    """
    known = option_types(config.to_dict())
    if key in known:
        return known[key]
    # `peft.rank_pattern.q_proj`: an entry of an option that is a mapping.
    for name, hint in known.items():
        for one in (hint, *typing.get_args(hint)):
            if key.startswith(f"{name}.") and typing.get_origin(one) is Mapping:
                return typing.get_args(one)[1]
    raise UserError(f"config key {key!r} is unknown{did_you_mean(key, list(known))}")


def option_types(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Every option that a config may set, by dotted key, with its type.

    Args:
      sections: The config; only its `peft.method` and `objective.name` are looked at.

    Raises:
      UserError: One of these names is unknown.
    """
    found: dict[str, Any] = dict.fromkeys(CHOICES, str)
    for name, cls in _section_classes(sections).items():
        hints = typing.get_type_hints(cls)
        found |= {f"{name}.{f.name}": hints[f.name] for f in dataclasses.fields(cls)}
    return found


def _section_classes(sections: Mapping[str, Any]) -> dict[str, Any]:
    """The dataclass of every section, in the order that data flows."""
    chosen = {}
    for key, (default, table) in CHOICES.items():
        section, _, option = key.partition(".")
        name = (sections.get(section) or {}).get(option, default)
        check_name(key, name, table)
        chosen[section] = table[name].Config
    return {
        "model": ModelConfig,
        "peft": chosen["peft"],
        "data": data.Config,
        "objective": chosen["objective"],
        "optimizer": optimizer.Config,
        "mesh": sharding.Config,
        "train": TrainConfig,
        "evaluate": EvaluateConfig,
        "checkpoint": orbax.Config,
    }


def build_experiment(config: ml_collections.ConfigDict) -> Experiment:
    """Turns a config's sections into checked, frozen dataclasses.

    Raises:
      UserError: A section, a key or a name is unknown or missing.
    """
    sections: dict[str, Any] = config.to_dict()
    classes = _section_classes(sections)
    for name, section in sections.items():
        if name not in classes:
            known = list(classes)
            raise UserError(
                f"config section {name!r} is unknown{did_you_mean(name, known)}"
            )
        if not isinstance(section, Mapping):
            raise UserError(f"config section {name!r} is {section!r}, not a mapping")
    method = sections.get("peft", {}).pop("method", CHOICES["peft.method"][0])
    objective = sections.get("objective", {}).pop("name", CHOICES["objective.name"][0])
    optimizing = sections.get("optimizer", {})
    for option, table in (("name", OPTIMIZERS), ("schedule", SCHEDULES)):
        if option in optimizing:
            check_name(f"optimizer.{option}", optimizing[option], table)
    return Experiment(
        method=METHODS[method],
        objective_module=OBJECTIVES[objective],
        **{n: make_section(c, n, sections.get(n, {})) for n, c in classes.items()},
    )

"""The one place where names in a config become objects."""

import dataclasses
import importlib.util
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jax.sharding import Mesh

from fjft import data, sharding, tree
from fjft.checkpoint import adapter as adapter_files
from fjft.checkpoint import orbax
from fjft.checkpoint.huggingface import Provenance, match
from fjft.checkpoint.loading import load_params
from fjft.checkpoint.source import ModelFiles, open_model
from fjft.errors import UserError
from fjft.models.families import FAMILIES
from fjft.models.fields import Fields
from fjft.models.heads import with_head
from fjft.models.layers import REMAT_POLICIES, Maker
from fjft.models.weights import Site, sites
from fjft.objectives.objectives import OBJECTIVES
from fjft.optimize import optimizer
from fjft.optimize.optimizer import OPTIMIZERS
from fjft.optimize.schedule import SCHEDULES
from fjft.options import (
    check_least,
    check_name,
    check_type,
    did_you_mean,
    make_section,
)
from fjft.peft.methods import METHODS

DTYPES = ("float32", "bfloat16", "float16", "auto")

# Options that decide which others their section has: default, and table of modules.
CHOICES = {
    "peft.method": ("full", METHODS),
    "objective.name": ("causal_lm", OBJECTIVES),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and how it is held.

    Attributes:
      source: A Hugging Face directory, a GGUF or safetensors file,
        `package:NAME/path`, or a hub id.
      revision: Branch, tag or commit of a hub id.
      dtype: Type of the frozen weights and of all activations; `auto` is the
        checkpoint's. What is trained is always float32.
      remat: What the backward pass recomputes, a key of `REMAT_POLICIES`.
    """

    source: str
    revision: str = "main"
    dtype: str = "bfloat16"
    remat: str = "full"

    def __post_init__(self):
        check_name("model.dtype", self.dtype, DTYPES)
        check_name("model.remat", self.remat, REMAT_POLICIES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, in which pieces, and what is told of it.

    Attributes:
      batch_size: Sequences (packed rows) per optimizer step over all devices.
      accumulation_steps: Microbatches that a batch is cut into.
      max_steps: Optimizer steps; 0 counts `num_epochs`.
      num_epochs: Passes over the data, when `max_steps` is 0.
      seed: Of the data order, new weights and dropout.
      log_steps: Steps between log lines; the loss logged is of all tokens since.
      report_to: Writers besides `log.jsonl`: `tensorboard`, `wandb`, with commas.
    """

    batch_size: int
    accumulation_steps: int = 1
    max_steps: int = 0
    num_epochs: float = 1.0
    seed: int = 0
    log_steps: int = 1
    report_to: str = ""

    def __post_init__(self):
        check_least("train.accumulation_steps", self.accumulation_steps, 1)
        check_least("train.max_steps", self.max_steps, 0)
        check_least("train.log_steps", self.log_steps, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """When and on what a run is judged.

    Attributes:
      eval_steps: Optimizer steps between evaluations; 0 is before and after only.
      batch_size: Sequences at a time over all devices; 0 is the training microbatch.
      prompt: A question whose answer is shown before and after training; "" is none.
      max_new_tokens: Longest answer.
    """

    eval_steps: int = 0
    batch_size: int = 0
    prompt: str = ""
    max_new_tokens: int = 64

    def __post_init__(self):
        check_least("evaluate.eval_steps", self.eval_steps, 0)
        check_least("evaluate.batch_size", self.batch_size, 0)
        check_least("evaluate.max_new_tokens", self.max_new_tokens, 1)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A config whose every section has been checked.

    Attributes:
      method: The module in `peft/` that `peft.method` names, and `peft` its options.
      objective_module: What `objective.name` names, and `objective` its options.
    """

    model: ModelConfig
    method: types.ModuleType
    peft: Any
    data: data.Config
    objective_module: types.ModuleType
    objective: Any
    optimizer: optimizer.Config
    mesh: sharding.Config
    train: TrainConfig
    evaluate: EvaluateConfig
    checkpoint: orbax.Config


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
            old = node.get(option) or {}
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
        if key.startswith(f"{name}.") and typing.get_origin(hint) is Mapping:
            return typing.get_args(hint)[1]
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


def find_family(files: ModelFiles) -> types.ModuleType:
    """The module of `FAMILIES` that a pretrained model belongs to.

    Raises:
      UserError: There is none.
    """
    check_name("model_type", str(files.config.model_type), FAMILIES)
    return FAMILIES[files.config.model_type]


def read_architecture(files: ModelFiles) -> tuple[types.ModuleType, Any]:
    """The family of a pretrained model, and its numbers; no weights are read.

    Raises:
      UserError: The model type is unknown, or its config asks for what is not there.
    """
    family = find_family(files)
    fields = Fields(files.config, files.tensors)
    arch = family.architecture(fields)
    fields.close()
    return family, arch


def build_model(
    files: ModelFiles,
    *,
    method: types.ModuleType | None,
    peft_config: Any,
    dtype: str,
    mesh: Mesh,
    seed: int = 0,
    adapter: str | Path | None = None,
    head: str | None = None,
    num_labels: int | None = None,
) -> Any:
    """Loads a pretrained model onto a mesh, with a method's adapters attached.

    Args:
      files: The pretrained model.
      method: A module of `METHODS`, or None for the bare model.
      peft_config: The method's options.
      dtype: One of `DTYPES`; what the method trains is float32 whatever it says.
      mesh: Where the parameters go.
      seed: Of the adapters' initial values.
      adapter: A PEFT directory to take the adapters' values from instead.
      head: A key of `models.heads`' table; None is the one that the checkpoint names.
        What the checkpoint lacks of it is made new, what it has of another head is
        passed over, and `model.provenance` names both.
      num_labels: How many labels the head tells apart; None is what the config says.
        A stored head for another number is made new.

    Raises:
      UserError: The model type is unknown, its weights do not fit its config, or a
        new head would not be trained.
    """
    if head is not None or num_labels is not None:
        family = find_family(files)
        if head is not None:
            check_name("head", head, getattr(family, "HEADS", ("causal_lm",)))
        config = with_head(files.config, head, num_labels)
        files = dataclasses.replace(files, config=config)
    family, arch = read_architecture(files)
    if dtype == "auto":
        dtype = _checkpoint_dtype(files)
    cuts = method.cuts(peft_config, arch.num_layers) if method else ()

    def make(rngs: nnx.Rngs) -> Any:
        model = family.MODEL(arch, Maker(rngs, jnp.dtype(dtype)), dtype, cuts)
        if method is not None:
            method.attach(model, sites(family.rows(arch), model), peft_config, rngs)
        return model

    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    table = sites(family.rows(arch), model)
    graphdef, abstract = tree.split(model)
    if method is not None:
        trainable = method.is_trainable(peft_config, table)
        abstract = {
            path: jax.ShapeDtypeStruct(p.shape, jnp.float32) if trainable(path) else p
            for path, p in abstract.items()
        }
    shapes = {path: p.shape for path, p in abstract.items()}
    shardings = sharding.param_shardings(tree.logical_axes(model), shapes, mesh)
    matched = match(
        files,
        table,
        abstract,
        prefix=getattr(arch, "base_name", None),
        may_lack_head=head is not None or getattr(arch, "head", "") == "base",
        other_labels=num_labels is not None,
    )
    provenance = Provenance(
        files, table, method, peft_config, matched.new, matched.passed_over
    )
    pretrained = [s for s in table if set(s.hf_names).isdisjoint(matched.new)]
    # Nobody looks at the pooler of a bare model unless asked to.
    if method is not None and getattr(arch, "head", "") != "base":
        _check_new_is_trained(table, matched.new, method, peft_config)
    params: tree.Params = {}
    old = {site.path for site in pretrained}
    new = {path: s for path, s in shardings.items() if path not in old}
    if new:
        init = jax.jit(
            lambda key: {
                path: value
                for path, value in tree.split(make(nnx.Rngs(key)))[1].items()
                if path in new
            },
            out_shardings=new,
        )
        params |= init(jax.random.key(seed))
    params |= load_params(files, pretrained, matched.stored, abstract, shardings)
    if adapter is not None:
        stored = adapter_files.load_adapter_params(
            model, provenance, abstract, shardings, adapter
        )
        params |= stored
        brought = {n for site in table if site.path in stored for n in site.hf_names}
        still_new = tuple(name for name in matched.new if name not in brought)
        provenance = dataclasses.replace(provenance, new=still_new)
    model = tree.merge(graphdef, params)
    model.provenance = provenance
    return model


def _check_new_is_trained(
    table: Sequence[Site], new: Sequence[str], method: types.ModuleType, config: Any
) -> None:
    """Refuses to leave a new head as random as it starts."""
    trainable = method.is_trainable(config, table)
    sites_of_new = [site for site in table if set(site.hf_names) & set(new)]
    idle = [site for site in sites_of_new if not trainable(site.path)]
    if idle:
        modules = sorted({m for site in idle for m in site.hf_modules})
        raise UserError(
            f"the checkpoint has no {', '.join(modules)}, so they start from random "
            "values, but this method would not train them; set "
            f"peft.modules_to_save={'|'.join(modules)}"
        )


def _checkpoint_dtype(files: ModelFiles) -> str:
    names = files.tensors.names
    sizes: dict[str, int] = {}
    for name in names:
        key = str(files.tensors.dtype(name))
        sizes[key] = sizes.get(key, 0) + 1
    return max(sizes, key=sizes.__getitem__)


def load_model(
    source: str,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    adapter: str | Path | None = None,
    revision: str = "main",
    head: str | None = None,
    num_labels: int | None = None,
) -> Any:
    """Loads a pretrained model.

    Args:
      source: A Hugging Face directory, a GGUF or safetensors file,
        `package:NAME/path`, or a hub id.
      dtype: Type of weights and activations: `float32`, `bfloat16`, `float16`, or
        `auto` for the checkpoint's own.
      mesh: Where the parameters go; one device when None.
      adapter: A PEFT directory to put on top.
      revision: Branch, tag or commit of a hub id.
      head: `base`, `masked_lm`, `sequence_classification`, `token_classification` or
        `question_answering` instead of the checkpoint's own; what it lacks of it is
        made new, as `model.provenance.new` tells.
      num_labels: How many labels the head tells apart, instead of what the config says.

    Returns:
      A Flax module: `model(input_ids)` gives logits, `model.config` is Hugging Face's.

    Raises:
      UserError: No such model, an unknown type, or a broken checkpoint.
    """
    check_name("dtype", dtype, DTYPES)
    method = peft_config = None
    if adapter is not None:
        described = adapter_files.read_adapter_config(adapter)
        known = {m.PEFT_TYPE: m for m in METHODS.values() if m.PEFT_TYPE}
        check_name("peft_type", str(described.get("peft_type")), known)
        method = known[described["peft_type"]]
        peft_config = method.from_peft(described)
    return build_model(
        open_model(source, revision),
        method=method,
        peft_config=peft_config,
        dtype=dtype,
        mesh=sharding.single_device_mesh() if mesh is None else mesh,
        adapter=adapter,
        head=head,
        num_labels=num_labels,
    )

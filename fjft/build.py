"""The one place where names in a config become objects."""

import dataclasses
import difflib
import importlib.util
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jax.sharding import Mesh

from fjft import data, sharding, tree
from fjft.checkpoint import adapter as adapter_files
from fjft.checkpoint import orbax
from fjft.checkpoint.huggingface import Provenance, check_names, load_params
from fjft.checkpoint.source import ModelFiles, open_model
from fjft.errors import UserError
from fjft.models.families import FAMILIES
from fjft.models.fields import Fields
from fjft.models.layers import REMAT_POLICIES, Maker
from fjft.models.weights import sites
from fjft.objectives.objectives import OBJECTIVES
from fjft.optimize import optimizer
from fjft.peft.methods import METHODS

T = TypeVar("T")
DTYPES = ("float32", "bfloat16", "float16", "auto")


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
        _check_name("model.dtype", self.dtype, DTYPES)
        _check_name("model.remat", self.remat, REMAT_POLICIES)


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
      UserError: No such file, it defines no `get_config`, or an unknown key.
    """
    file, _, argument = str(path).partition(":")
    if not Path(file).is_file():
        raise UserError(f"no config file {file!r}")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{file} defines no function get_config(arg='')")
    config = module.get_config(argument)
    override(config, overrides or {})
    return config


def override(config: ml_collections.ConfigDict, values: Mapping[str, Any]) -> None:
    """Sets values by dotted key, in place.

    Raises:
      UserError: A key is unknown, or a value has another type than the one it replaces.
    """
    for key, value in values.items():
        *parents, last = key.split(".")
        node: Any = config
        for parent in parents:
            node = (
                node.get(parent) if isinstance(node, Mapping | type(config)) else None
            )
        if not isinstance(node, ml_collections.ConfigDict) or last not in node:
            known = [k for k, _ in _flat_items(config)]
            raise UserError(f"config key {key!r} is unknown{_hint(key, known)}")
        try:
            node[last] = value
        except TypeError as error:
            raise UserError(
                f"{key}={value!r}: expected {type(node[last]).__name__}"
            ) from error


def _flat_items(config: ml_collections.ConfigDict, prefix: str = "") -> list:
    items = []
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            items += _flat_items(value, f"{prefix}{key}.")
        else:
            items.append((f"{prefix}{key}", value))
    return items


def _hint(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {known}"


def _check_name(option: str, name: str, known: Any) -> None:
    if name not in known:
        raise UserError(f"{option}={name!r} is unknown; use one of {list(known)}")


def build_experiment(config: ml_collections.ConfigDict) -> Experiment:
    """Turns a config's sections into checked, frozen dataclasses.

    Raises:
      UserError: A section, a key or a name is unknown or missing.
    """
    sections = {name: dict(section) for name, section in config.to_dict().items()}
    names = [field.name for field in dataclasses.fields(Experiment)]
    known = [n for n in names if n not in ("method", "objective_module")]
    for name in sections:
        if name not in known:
            raise UserError(f"config section {name!r} is unknown{_hint(name, known)}")
    peft = sections.get("peft", {})
    method = peft.pop("method", "full")
    _check_name("peft.method", method, METHODS)
    objective = sections.get("objective", {})
    objective_name = objective.pop("name", "causal_lm")
    _check_name("objective.name", objective_name, OBJECTIVES)
    classes = {
        "model": ModelConfig,
        "peft": METHODS[method].Config,
        "data": data.Config,
        "objective": OBJECTIVES[objective_name].Config,
        "optimizer": optimizer.Config,
        "mesh": sharding.Config,
        "train": TrainConfig,
        "evaluate": EvaluateConfig,
        "checkpoint": orbax.Config,
    }
    return Experiment(
        method=METHODS[method],
        objective_module=OBJECTIVES[objective_name],
        **{n: _section(c, n, sections.get(n, {})) for n, c in classes.items()},
    )


def _section(cls: type[T], name: str, values: Mapping[str, Any]) -> T:
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            hint = _hint(key, list(fields))
            raise UserError(f"config key '{name}.{key}' is unknown{hint}")
    for key, field in fields.items():
        required = (
            field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        )
        if required and key not in values:
            raise UserError(f"config key '{name}.{key}' is missing")
    return cls(**values)


def build_model(
    files: ModelFiles,
    *,
    method: types.ModuleType | None,
    peft_config: Any,
    dtype: str,
    mesh: Mesh,
    seed: int = 0,
    adapter: str | Path | None = None,
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

    Raises:
      UserError: The model type is unknown, or its weights do not fit its config.
    """
    _check_name("model_type", files.config.model_type, FAMILIES)
    family = FAMILIES[files.config.model_type]
    fields = Fields(files.config)
    arch = family.architecture(fields)
    fields.close()
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
    provenance = Provenance(files, table, method, peft_config)

    pretrained = {site.path for site in table}
    check_names(files, table, abstract)
    params: tree.Params = {}
    new = {path: s for path, s in shardings.items() if path not in pretrained}
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
    params |= load_params(files, table, abstract, shardings)
    if adapter is not None:
        params |= adapter_files.load_adapter_params(
            model, provenance, abstract, shardings, adapter
        )
    model = tree.merge(graphdef, params)
    model.provenance = provenance
    return model


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
) -> Any:
    """Loads a pretrained model.

    Args:
      source: A Hugging Face directory, a GGUF or safetensors file,
        `package:NAME/path`, or a hub id.
      dtype: Type of weights and activations: `float32`, `bfloat16`, `float16`, or
        `auto` for the checkpoint's own.
      mesh: Where the parameters go; one device when None.
      adapter: A PEFT directory to put on top.

    Returns:
      A Flax module: `model(input_ids)` gives logits, `model.config` is Hugging Face's.

    Raises:
      UserError: No such model, an unknown type, or a broken checkpoint.
    """
    _check_name("dtype", dtype, DTYPES)
    method = peft_config = None
    if adapter is not None:
        described = adapter_files.read_adapter_config(adapter)
        known = {m.PEFT_TYPE: m for m in METHODS.values() if m.PEFT_TYPE}
        _check_name("peft_type", described.get("peft_type"), known)
        method = known[described["peft_type"]]
        peft_config = method.from_peft(described)
    return build_model(
        open_model(source),
        method=method,
        peft_config=peft_config,
        dtype=dtype,
        mesh=sharding.single_device_mesh() if mesh is None else mesh,
        adapter=adapter,
    )

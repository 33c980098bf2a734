"""PEFT directories: adapters that PEFT reads, and PEFT's adapters read here."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fjft import tree
from fjft.checkpoint.huggingface import Provenance
from fjft.checkpoint.quantizing import is_quantized, restore_weights
from fjft.checkpoint.safetensors import open_safetensors
from fjft.checkpoint.safetensors_writer import OutTensor, write_safetensors
from fjft.checkpoint.torch_bin import open_bin
from fjft.distributed import fetch, is_first, wait
from fjft.errors import UserError
from fjft.models.heads import of_model, task_type
from fjft.models.layers import TiedHead

CONFIG_NAME = "adapter_config.json"
# Those of PEFT, unless a method says otherwise: what is written, and what it was once.
WEIGHTS_NAMES = ("adapter_model.safetensors", "adapter_model.bin")


def save_adapter(model: Any, directory: str | Path) -> None:
    """Writes a directory that `peft` loads on top of the same base model.

    Of several processes all must call it; process 0 writes.

    Raises:
      UserError: The model carries no adapter that PEFT knows, or there is no space.
    """
    provenance: Provenance = model.provenance
    method, config = provenance.method, provenance.peft_config
    if method is None or method.PEFT_TYPE is None:
        raise UserError(
            "the model carries no adapter; write its weights with save_model"
        )
    head = task_type(of_model(model))
    if hasattr(method, "plain"):
        model, config = method.plain(model, provenance.sites, config)
    _, params = tree.split(model)
    directory = Path(directory)
    if is_first():
        directory.mkdir(parents=True, exist_ok=True)
    whole = functools.cache(lambda path: fetch(params[path]))
    tensors = []
    for tensor in method.peft_tensors(model, provenance.sites, config):
        param = params[tensor.path]
        shape = jax.eval_shape(lambda x, i=tensor.index: x[i], param).shape
        tensors.append(
            OutTensor(
                tensor.name,
                np.dtype(param.dtype),
                shape,
                lambda path=tensor.path, i=tensor.index: whole(path)[i],
            )
        )
    write_safetensors(directory / _weights_names(method)[0], tensors)
    described = {
        "peft_type": method.PEFT_TYPE,
        "task_type": head,
        "base_model_name_or_path": provenance.files.source,
        "inference_mode": True,
        **method.peft_config(model, provenance.sites, config),
    }
    text = json.dumps(described, indent=2, ensure_ascii=False)
    if is_first():
        (directory / CONFIG_NAME).write_text(text + "\n", "utf-8")
    wait("save_adapter")


def merge_adapter(model: Any) -> Any:
    """A model without adapters whose weights do what weights and adapters did.

    The given model is left as it is. Sums are float32, rounded to the weights' dtype
    once. A quantized model's adapters are folded into its weights in full precision,
    which are read again from its source.

    Raises:
      UserError: The model has virtual tokens, bottlenecks, or an adapter of its
        embeddings alone that are its output head too, or of that alone; or the source
        of a quantized one is not there any more.
    """
    if getattr(model, "prompt", None) is not None:
        raise UserError(
            "virtual tokens are no change of the weights, so nothing can merge them "
            "into those; write them with save_adapter"
        )
    if is_quantized(model):
        model = restore_weights(model)
    merged = tree.merge(*tree.split(model))
    module: Any
    for _, module in list(nnx.iter_modules(merged)):
        adapter = getattr(module, "adapter", None)
        if adapter is not None:
            if not hasattr(adapter, "merge"):
                raise UserError(
                    "bottleneck adapters are no change of the weights, so nothing can "
                    "merge them into those; write them with save_adapter"
                )
            if isinstance(module, TiedHead) or getattr(adapter, "is_tied", False):
                raise UserError(
                    "the adapter changes one of this model's embeddings and output "
                    "head, which are one matrix, so that to merge it would change "
                    "both; write it with save_adapter"
                )
            graphdef, params = tree.split(module)
            tree.update(module, _merge(graphdef, params))
            module.adapter = nnx.data(None)
    merged.provenance = dataclasses.replace(
        model.provenance, method=None, peft_config=None
    )
    return merged


@functools.partial(jax.jit, static_argnums=0)
def _merge(graphdef: nnx.GraphDef, params: tree.Params) -> tree.Params:
    """A linear map's arrays, after its adapter was folded into it."""
    linear = tree.merge(graphdef, params)
    linear.adapter.merge(linear)
    return tree.split(linear)[1]


def _weights_names(method: Any) -> tuple[str, str]:
    return getattr(method, "WEIGHTS_NAMES", WEIGHTS_NAMES)


def read_adapter_config(directory: str | Path) -> dict[str, Any]:
    """The `adapter_config.json` of a PEFT directory, or of one of AdapterHub's.

    Raises:
      UserError: There is none, or it is broken.
    """
    path = Path(directory) / CONFIG_NAME
    if not path.is_file():
        raise UserError(f"{directory} is no PEFT adapter: it has no {CONFIG_NAME}")
    try:
        described = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); mend it") from error
    return (
        {"peft_type": "ADAPTERHUB"} | described if "config" in described else described
    )


def load_adapter_params(
    model: nnx.Module,
    provenance: Provenance,
    abstract: Mapping[str, Any],
    shardings: Mapping[str, Any],
    directory: str | Path,
) -> tree.Params:
    """Reads the parameters that a PEFT directory holds.

    Args:
      model: The model, abstract or not, with the method's adapters attached.
      provenance: The model's.
      abstract: Shape and dtype of each parameter.
      shardings: How each parameter lies on the devices.
      directory: The PEFT directory.

    Raises:
      UserError: The tensors are not those of this model's adapter.
    """
    names = _weights_names(provenance.method)
    path, old_path = (Path(directory) / name for name in names)
    if not path.is_file() and not old_path.is_file():
        raise UserError(f"{directory} has no {names[0]}")
    source = open_safetensors(path) if path.is_file() else open_bin(old_path)
    table = provenance.method.peft_tensors(
        model, provenance.sites, provenance.peft_config
    )
    wanted = {tensor.name for tensor in table}
    # PEFT may add the base's own table or head, where the adapter has a part of them.
    found = {name for name in source.names if ".base_layer." not in name}
    if found != wanted:
        first = sorted(found ^ wanted)[0]
        raise UserError(
            f"{directory} is an adapter for another model than "
            f"{provenance.files.source}: {len(found ^ wanted)} tensors differ, the "
            f"first is {first!r}"
        )
    loaded: dict[str, np.ndarray] = {}
    for tensor in table:
        shape, dtype = abstract[tensor.path].shape, abstract[tensor.path].dtype
        if tensor.path not in loaded:
            loaded[tensor.path] = np.zeros(shape, dtype)
        part = loaded[tensor.path][tensor.index]
        if source.shape(tensor.name) != part.shape:
            raise UserError(
                f"{directory} is an adapter for another model than "
                f"{provenance.files.source}: {tensor.name} has shape "
                f"{source.shape(tensor.name)}, this model needs {part.shape}"
            )
        every = tuple(slice(0, n) for n in part.shape)
        loaded[tensor.path][tensor.index] = source.read(tensor.name, every)
    return {p: jax.device_put(jnp.asarray(a), shardings[p]) for p, a in loaded.items()}

"""Hugging Face weights: streamed in, shard by shard, and written back bit for bit."""

import copy
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from fjft import tree
from fjft.checkpoint.safetensors_writer import OutTensor, write_sharded
from fjft.checkpoint.source import ModelFiles, TensorSource
from fjft.errors import UserError
from fjft.models.weights import Site

# Buffers that old checkpoints carry and that every implementation works out itself.
_DERIVED = re.compile(r".*\.(rotary_emb\.inv_freq|masked_bias|attn\.bias)")


@dataclasses.dataclass(frozen=True, eq=False)
class Provenance:
    """Where a model came from and what has been put into it.

    Attributes:
      files: The pretrained model.
      sites: Where each of its tensors lies in our model.
      method: The module in `peft/` whose adapters it carries.
      peft_config: That method's options.
    """

    files: ModelFiles
    sites: Sequence[Site]
    method: Any
    peft_config: Any


def load_params(
    files: ModelFiles,
    sites: Sequence[Site],
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    shardings: Mapping[str, NamedSharding],
) -> tree.Params:
    """Reads the pretrained parameters, each device's slices only.

    A parameter is assembled shard by shard, a stacked one layer by layer, and cast on
    the way, so the host holds one shard and one layer's slice of it at a time.

    Args:
      files: The pretrained model.
      sites: Where its tensors lie.
      abstract: Shape and dtype of each parameter.
      shardings: How each parameter lies on the devices.

    Raises:
      UserError: A tensor is missing, superfluous or of another shape.
    """
    check_names(files, sites, abstract)
    return {
        site.path: _load_param(
            files.tensors, site, abstract[site.path], shardings[site.path]
        )
        for site in sites
    }


def check_names(
    files: ModelFiles,
    sites: Sequence[Site],
    abstract: Mapping[str, jax.ShapeDtypeStruct],
) -> None:
    """Compares the checkpoint's tensors with those the model is made of.

    Raises:
      UserError: A tensor is missing, superfluous or of another shape.
    """
    tensors = files.tensors
    wanted = {name: site for site in sites for name in site.hf_names}
    missing = [name for name in wanted if name not in tensors.names]
    if missing:
        raise UserError(
            f"{files.source}: {len(missing)} tensors are missing, the first "
            f"is {missing[0]!r}; the checkpoint does not fit its config"
        )
    aliases = {name for site in sites for name in site.aliases}
    extra = [
        name
        for name in tensors.names
        if name not in wanted and name not in aliases and not _DERIVED.fullmatch(name)
    ]
    if extra:
        raise UserError(
            f"{files.source}: {len(extra)} tensors have no place in a "
            f"{files.config.model_type} model, the first is {sorted(extra)[0]!r}"
        )
    for name, site in wanted.items():
        shape = site.hf_shape(abstract[site.path].shape)
        if tensors.shape(name) != shape:
            raise UserError(
                f"{files.source}: {name} has shape {tensors.shape(name)}, "
                f"its config asks for {shape}"
            )


def _load_param(
    tensors: TensorSource,
    site: Site,
    abstract: jax.ShapeDtypeStruct,
    sharding: NamedSharding,
) -> jax.Array:
    devices_of: dict[tuple, list] = {}
    shape = abstract.shape
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        devices_of.setdefault(bounds, []).append(device)
    shards = []
    for bounds, devices in devices_of.items():
        index = tuple(slice(*bound) for bound in bounds)
        host = _read_shard(tensors, site, index, abstract.dtype)
        placed = [jax.device_put(host, device) for device in devices]
        shards += jax.block_until_ready(placed)
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _read_shard(
    tensors: TensorSource, site: Site, index: tuple[slice, ...], dtype: Any
) -> np.ndarray:
    lead, rest = index[: len(site.lead)], index[len(site.lead) :]
    hf_index = rest[::-1] if site.transpose else rest
    if not lead:
        part = tensors.read(site.hf_names[0], hf_index)
        return (part.T if site.transpose else part).astype(dtype, copy=False)
    shard = np.empty([s.stop - s.start for s in index], dtype)
    for name, place in site.tensors():
        if all(s.start <= i < s.stop for i, s in zip(place, lead, strict=True)):
            here = tuple(i - s.start for i, s in zip(place, lead, strict=True))
            part = tensors.read(name, hf_index)
            shard[here] = part.T if site.transpose else part
    return shard


def save_model(model: nnx.Module, directory: str | Path, dtype: Any = None) -> None:
    """Writes a Hugging Face directory: weights, configs, tokenizer, chat template.

    Weights that were loaded in their own dtype and not trained come back bit for bit.

    Args:
      model: A model without adapters; see `merge_adapter`.
      directory: Made when missing.
      dtype: Type to store the weights in; each one's own when None.

    Raises:
      UserError: The model carries an adapter, or there is no space.
    """
    provenance: Provenance = model.provenance
    _, params = tree.split(model)
    if set(params) - {site.path for site in provenance.sites}:
        raise UserError(
            "the model carries an adapter: write it with save_adapter, or fold it "
            "into the weights with merge_adapter first"
        )
    tensors = [
        _out_tensor(name, params[site.path], place, site, dtype)
        for site in provenance.sites
        for name, place in site.tensors()
    ]
    tensors.sort(key=lambda tensor: _natural(tensor.name))
    write_sharded(Path(directory), tensors)
    largest = max(params.values(), key=lambda p: p.size)
    _write_companions(
        provenance.files, Path(directory), np.dtype(dtype or largest.dtype)
    )


def _out_tensor(
    name: str, param: jax.Array, place: tuple[int, ...], site: Site, dtype: Any
) -> OutTensor:
    dtype = np.dtype(dtype or param.dtype)

    def produce() -> np.ndarray:
        part = np.asarray(jax.device_get(param[place] if place else param))
        return (part.T if site.transpose else part).astype(dtype, copy=False)

    return OutTensor(name, dtype, site.hf_shape(param.shape), produce)


def _natural(name: str) -> list:
    """Sorts `layers.2` before `layers.10`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _write_companions(files: ModelFiles, directory: Path, dtype: np.dtype) -> None:
    """Everything in a Hugging Face directory that is not weights."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES,
    )

    config = copy.deepcopy(files.config)
    config.dtype = dtype.name
    if not config.architectures:
        config.architectures = [CLASSES[config.model_type]]
    config.save_pretrained(directory)
    if files.generation_config is not None:
        text = json.dumps(files.generation_config, indent=2, ensure_ascii=False)
        (directory / "generation_config.json").write_text(text + "\n", "utf-8")
    try:
        tokenizer = files.load_tokenizer()
    except UserError:
        return  # A model without a tokenizer is saved as it came.
    tokenizer.save_pretrained(directory)

"""Loads pretrained models onto a mesh, with a method's adapters attached."""

import dataclasses
import functools
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fjft import sharding, tree
from fjft.blueprint import Blueprint, choose_head, draw_model, most_common_dtype
from fjft.checkpoint import adapter as adapter_files
from fjft.checkpoint.huggingface import Provenance, match
from fjft.checkpoint.loading import load_params
from fjft.checkpoint.quantizing import load_quantized, read_whole
from fjft.checkpoint.source import ModelFiles, open_model
from fjft.errors import UserError
from fjft.models.attention import AUTO, Way
from fjft.models.codes import QUANTIZATIONS
from fjft.models.layers import Rngs
from fjft.models.weights import Site
from fjft.options import DTYPES, check_name
from fjft.peft.methods import METHODS


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
    quantization: str = "",
    matmuls: str = "",
    attention: Way = AUTO,
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
      quantization: A key of `FORMATS` for linear maps that are not trained, or "".
      matmuls: A key of `narrow.KINDS` that linear maps multiply in, or "".
      attention: Which kernels its attention may take.

    Raises:
      UserError: The model type is unknown, its weights do not fit its config, or a
        new head would not be trained.
    """
    files = choose_head(files, head, num_labels)
    blueprint = draw_model(
        files,
        method=method,
        peft_config=peft_config,
        dtype=most_common_dtype(files) if dtype == "auto" else dtype,
        mesh=mesh,
        quantization=quantization,
        matmuls=matmuls,
        attention=attention,
    )
    arch, table = blueprint.model.arch, blueprint.sites
    matched = match(
        files,
        table,
        blueprint.weights,
        prefix=getattr(arch, "base_name", None),
        may_lack_head=head is not None or getattr(arch, "head", "") == "base",
        other_labels=num_labels is not None,
    )
    own_dtypes: dict[str, np.dtype] = {}
    if dtype == "auto":
        own_dtypes = {n: files.tensors.dtype(s) for n, s in matched.stored.items()}
        blueprint = _wide_enough(blueprint, own_dtypes)
    provenance = Provenance(
        files,
        table,
        method,
        peft_config,
        matched.new,
        matched.passed_over,
        own_dtypes,
    )
    pretrained = [s for s in table if set(s.hf_names).isdisjoint(matched.new)]
    # Nobody looks at the pooler of a bare model unless asked to.
    if method is not None and getattr(arch, "head", "") != "base":
        _check_new_is_trained(table, matched.new, method, peft_config)
    shardings = blueprint.shardings
    params = load_quantized(
        files, blueprint.model, blueprint.in_codes, matched.stored, blueprint.params
    )
    pretrained = [site for site in pretrained if site.path in blueprint.params]
    old = {site.path for site in pretrained} | params.keys()
    new = {path: s for path, s in shardings.items() if path not in old}
    if new:
        init = jax.jit(
            lambda key: {
                path: value.astype(blueprint.params[path].dtype)
                for path, value in tree.split(blueprint.make(Rngs(key)))[1].items()
                if path in new
            },
            out_shardings=new,
        )
        params |= init(jax.random.key(seed))
    params |= load_params(
        files, pretrained, matched.stored, blueprint.params, shardings
    )
    model = tree.merge(blueprint.graphdef, params)
    model.provenance = provenance
    if method is not None and hasattr(method, "start"):
        method.start(model, table, peft_config, functools.partial(read_whole, model))
    if adapter is not None:
        stored = adapter_files.load_adapter_params(
            blueprint.model, provenance, blueprint.params, shardings, adapter
        )
        tree.update(model, stored)
        brought = {n for site in table if site.path in stored for n in site.hf_names}
        still_new = tuple(name for name in matched.new if name not in brought)
        provenance = dataclasses.replace(provenance, new=still_new)
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


def _wide_enough(blueprint: Blueprint, own: Mapping[str, np.dtype]) -> Blueprint:
    """The same with float32 for what the types given would round."""
    params = dict(blueprint.params)
    for site in blueprint.sites:
        if site.path not in params:
            continue
        given = params[site.path]
        needed = {own[name] for name in site.hf_names if name in own}
        if needed - {given.dtype}:
            params[site.path] = given.update(dtype=jnp.float32)
    return dataclasses.replace(blueprint, params=params)


def load_model(
    source: str,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    adapter: str | Path | None = None,
    revision: str = "main",
    head: str | None = None,
    num_labels: int | None = None,
    quantization: str = "",
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
      quantization: `nf4`, `nf4_double`, `int8`, `int4`, `fp8` or, as GGUF files have
        them, `q8_0`, `q4_0`, `q4_1` or `q4_k` holds the linear maps, but the head, in
        codes of so many bits; "" holds them as they are.

    Returns:
      A Flax module: `model(input_ids)` gives logits, `model.config` is Hugging Face's.

    Raises:
      UserError: No such model, an unknown type, or a broken checkpoint.
    """
    check_name("dtype", dtype, DTYPES)
    check_name("quantization", quantization, QUANTIZATIONS)
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
        quantization=quantization,
    )

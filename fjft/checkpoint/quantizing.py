"""Quantizes a checkpoint's linear maps while it is loaded, and reads them whole again.

Tensor by tensor: the parts of one that the devices need are read, placed, quantized
where they lie and stored in their layer of the stack. So neither the host nor a device
ever holds more than one tensor in full precision. A tensor that a GGUF file holds in
the very format that is asked for keeps its codes.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from fjft import tree
from fjft.checkpoint.huggingface import source_of_codes, stored_names
from fjft.checkpoint.loading import load_params
from fjft.checkpoint.source import CodedSource, ModelFiles
from fjft.errors import UserError
from fjft.models.codes import FORMATS, Parts, check_divides
from fjft.models.layers import Linear
from fjft.models.moe import ExpertMLPs
from fjft.models.quantized import Quantized
from fjft.models.weights import Site, module_at


def quantize_model(
    model: Any,
    sites: Sequence[Site],
    quantization: str,
    trainable: Callable[[str], bool],
) -> None:
    """Puts codes in the place of a model's linear maps; they hold no numbers yet.

    Embeddings, norms, heads and what is trained stay as they are.

    Args:
      model: The model, abstract or not.
      sites: Where a checkpoint's tensors lie in it.
      quantization: A key of `FORMATS`.
      trainable: Whether a path's parameter will be trained.

    Raises:
      UserError: There is nothing to quantize, or it cannot be.
    """
    if any(isinstance(m, ExpertMLPs) for _, m in nnx.iter_modules(model)):
        raise UserError(
            f"model.quantization={quantization!r}: most of this model are routed "
            "experts, which are not quantized; leave model.quantization empty"
        )
    chosen = linear_maps(model, sites)
    chosen = [site for site in chosen if not trainable(site.path)]
    if not chosen:
        raise UserError(
            f"model.quantization={quantization!r}: all linear maps are trained, and "
            "codes cannot be; leave model.quantization empty, or train an adapter "
            "with peft.method=lora"
        )
    for site in chosen:
        linear = module_at(model, site.module)
        check_divides(quantization, site.path, linear.weight.shape)
        linear.quantize(quantization)


def linear_maps(model: Any, sites: Sequence[Site]) -> list[Site]:
    """The sites of the weights of linear maps, but the head's."""
    return [site for site in sites if _is_linear(model, site)]


def _is_linear(model: Any, site: Site) -> bool:
    if site.head or site.path == "lm_head.weight" or not site.path.endswith(".weight"):
        return False
    return isinstance(module_at(model, site.module), Linear)


def is_quantized(model: Any) -> bool:
    """Whether any of the model's linear maps lie in codes."""
    return any(isinstance(m, Quantized) for _, m in nnx.iter_modules(model))


def load_quantized(
    files: ModelFiles,
    model: Any,
    sites: Sequence[Site],
    stored: Mapping[str, str],
    abstract: Mapping[str, jax.ShapeDtypeStruct],
) -> tree.Params:
    """Reads and quantizes the linear maps of a quantized model.

    Args:
      files: The pretrained model.
      model: The model, abstract.
      sites: The weights that it holds in codes.
      stored: The checkpoint's name of each tensor.
      abstract: Shape, dtype and sharding of each parameter.
    """
    params, tensors = {}, files.tensors
    for site in sites:
        weight: Quantized = module_at(model, site.path)
        stack = {name: abstract[f"{site.path}.{name}"] for name in weight.part_names}
        one = {name: _layer(part, weight.ndim - 2) for name, part in stack.items()}
        quantize = _make_quantize(weight.format, tuple(one.items()))
        layers = []
        for name in site.hf_names:
            if isinstance(tensors, CodedSource) and (
                tensors.kind(stored[name]) == weight.format
            ):
                layer = _read_codes(tensors, stored[name], one)
            else:
                layer = quantize(_read_matrix(files, site, stored, name, one["codes"]))
            # The next tensor is read when this one's room is free again.
            layers.append(jax.block_until_ready(layer))
        stacked = _make_stack(tuple(stack.items()))(layers)
        params |= {f"{site.path}.{name}": part for name, part in stacked.items()}
    return params


def _layer(stack: jax.ShapeDtypeStruct, lead: int) -> jax.ShapeDtypeStruct:
    """What a stack, which has so many leading axes, has of one layer."""
    assert isinstance(stack.sharding, NamedSharding)
    spec = PartitionSpec(*stack.sharding.spec[lead:])
    sharding = NamedSharding(stack.sharding.mesh, spec)
    return jax.ShapeDtypeStruct(stack.shape[lead:], stack.dtype, sharding=sharding)


def _read_matrix(
    files: ModelFiles,
    site: Site,
    stored: Mapping[str, str],
    name: str,
    codes: jax.ShapeDtypeStruct,
) -> jax.Array:
    """One of a site's tensors in full precision, laid out as its codes will be."""
    one = dataclasses.replace(site, hf_names=(name,), lead=())
    full = jax.ShapeDtypeStruct(codes.shape[::-1], files.tensors.dtype(stored[name]))
    sharding = _of_matrix(codes.sharding, lead=0)
    return load_params(files, [one], stored, {site.path: full}, {site.path: sharding})[
        site.path
    ]


def _of_matrix(sharding: NamedSharding, lead: int) -> NamedSharding:
    """How a matrix lies whose codes lie turned, under `lead` axes of its stack."""
    *stack, axis_in, axis_out = sharding.spec
    spec = (*stack[len(stack) - lead :], axis_out, axis_in)
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


Layout = tuple[tuple[str, jax.ShapeDtypeStruct], ...]


@functools.cache
def _make_quantize(form: str, layout: Layout) -> Callable[[jax.Array], Parts]:
    shardings = {name: part.sharding for name, part in layout}
    return jax.jit(FORMATS[form].quantize, out_shardings=shardings)


@functools.cache
def _make_stack(layout: Layout) -> Callable[[Sequence[Parts]], Parts]:
    """Makes the function that stacks layers.

    All at once: where codes of 4 bits are put into a stack one after another, a CPU
    goes through the whole stack for each.
    """

    def stack(layers: Sequence[Parts]) -> Parts:
        return {
            name: jnp.stack([layer[name] for layer in layers]).reshape(whole.shape)
            for name, whole in layout
        }

    return jax.jit(stack, out_shardings={name: part.sharding for name, part in layout})


def _read_codes(
    tensors: CodedSource, name: str, layout: Mapping[str, jax.ShapeDtypeStruct]
) -> Parts:
    """One matrix's codes and scales, bit for bit as the file has them."""

    @functools.cache
    def read(start: int | None, stop: int | None) -> Mapping[str, np.ndarray]:
        return tensors.read_codes(name, slice(start, stop))

    def place(part: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
        def cut(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            columns, rows = index
            return read(rows.start, rows.stop)[part].T[columns]

        return jax.make_array_from_callback(shape.shape, shape.sharding, cut)

    return {part: place(part, shape) for part, shape in layout.items()}


def restore_weights(model: Any) -> Any:
    """The model with its linear maps in full precision, read again from its source.

    The given model is left as it is; what has been trained is shared with it.

    Raises:
      UserError: The source is not there any more.
    """
    whole = tree.merge(*tree.split(model))
    for site in model.provenance.sites:
        linear = module_at(whole, site.module)
        weight = linear.weight if site.path.endswith(".weight") else None
        if isinstance(weight, Quantized):
            linear.weight = nnx.Param(read_whole(model, site), axes=weight.axes)
    whole.provenance = model.provenance
    return whole


def read_whole(model: Any, site: Site) -> jax.Array:
    """A weight that lies in codes, in full precision, read again from its source.

    Raises:
      UserError: The source is not there any more.
    """
    files, weight = model.provenance.files, module_at(model, site.path)
    stored = stored_names(files.tensors, [site])
    full = jax.ShapeDtypeStruct(weight.shape, weight.dtype)
    sharding = weight.codes[...].sharding
    assert isinstance(sharding, NamedSharding)
    sharding = _of_matrix(sharding, lead=weight.ndim - 2)
    with source_of_codes(files):
        loaded = load_params(
            files, [site], stored, {site.path: full}, {site.path: sharding}
        )
    return loaded[site.path]

"""Models before they have any numbers: drawn from a config, nothing allocated."""

import copy
import dataclasses
import types
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from fjft import sharding, tree
from fjft.checkpoint.quantizing import linear_maps, quantize_model
from fjft.checkpoint.source import ModelFiles, ModelInfo
from fjft.data.examples import Labels
from fjft.errors import UserError
from fjft.models.attention import AUTO, Way, set_way
from fjft.models.families import FAMILIES
from fjft.models.fields import Fields
from fjft.models.heads import with_head
from fjft.models.layers import Maker, Rngs
from fjft.models.weights import Site, module_at, sites
from fjft.options import DTYPES, check_name

Info = TypeVar("Info", bound=ModelInfo)


def find_family(files: ModelInfo) -> types.ModuleType:
    """The module of `FAMILIES` that a pretrained model belongs to.

    Raises:
      UserError: There is none.
    """
    check_name("model_type", str(files.config.model_type), FAMILIES)
    return FAMILIES[files.config.model_type]


def choose_head(files: Info, head: str | None, num_labels: int | None = None) -> Info:
    """A pretrained model whose config asks for another head, or for so many labels.

    Raises:
      UserError: The family has no such head.
    """
    if head is None and num_labels is None:
        return files
    if head is not None:
        known = getattr(find_family(files), "HEADS", ("causal_lm",))
        check_name("head", head, known)
    config = with_head(files.config, head, num_labels)
    return dataclasses.replace(files, config=config)


def name_labels(files: Info, labels: Labels) -> Info:
    """A pretrained model whose config says what its head's labels mean."""
    config = copy.deepcopy(files.config)
    config.id2label = dict(enumerate(labels.names))
    config.label2id = {name: i for i, name in enumerate(labels.names)}
    config.problem_type = labels.problem_type  # pyright: ignore[reportAttributeAccessIssue]
    return dataclasses.replace(files, config=config)


def read_architecture(files: ModelInfo) -> tuple[types.ModuleType, Any]:
    """The family of a pretrained model, and its numbers; no weights are read.

    Raises:
      UserError: The model type is unknown, or its config asks for what is not there.
    """
    family = find_family(files)
    tensors = files.tensors if _has_weights(files) else None
    fields = Fields(files.config, tensors)
    arch = family.architecture(fields)
    fields.close()
    return family, arch


def _has_weights(files: ModelInfo) -> TypeGuard[ModelFiles]:
    return isinstance(files, ModelFiles) and bool(files.tensors.names)


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """A model before it has any numbers: what it is made of, and where that will lie.

    Attributes:
      model: The module, with shapes in the place of arrays.
      graphdef: Its structure.
      params: Shape, dtype and sharding of each parameter, by path.
      sites: Where each tensor of a checkpoint lies in it.
      make: Makes the module with new numbers.
    """

    model: Any
    graphdef: nnx.GraphDef
    params: dict[str, jax.ShapeDtypeStruct]
    sites: Sequence[Site]
    make: Callable[[Rngs], Any]

    @property
    def shardings(self) -> dict[str, Any]:
        """How each parameter lies on the devices."""
        return {path: p.sharding for path, p in self.params.items()}

    @property
    def in_codes(self) -> list[Site]:
        """The sites of quantized weights, each of which is several parameters."""
        return [site for site in self.sites if site.path not in self.params]

    @property
    def weights(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What has the shape of each site's weight."""
        codes = {s.path: module_at(self.model, s.path) for s in self.in_codes}
        whole = {
            path: jax.ShapeDtypeStruct(weight.shape, weight.dtype)
            for path, weight in codes.items()
        }
        return self.params | whole


def draw_model(
    files: ModelInfo,
    *,
    method: types.ModuleType | None,
    peft_config: Any,
    dtype: str,
    mesh: Mesh,
    quantization: str = "",
    matmuls: str = "",
    attention: Way = AUTO,
) -> Blueprint:
    """Draws a model with a method's adapters attached; nothing is allocated.

    Args:
      files: The pretrained model; only its config is read.
      method: A module of `METHODS`, or None for the bare model.
      peft_config: The method's options.
      dtype: One of `DTYPES` but `auto`; what the method trains is float32 anyway.
      mesh: Where the parameters will lie.
      quantization: A key of `FORMATS` for linear maps that are not trained, or "".
      matmuls: A key of `narrow.KINDS` that linear maps multiply in, or "".
      attention: Which kernels its attention may take.

    Raises:
      UserError: The model type is unknown, or a parameter does not divide over the
        mesh or into the blocks of its quantization.
    """
    family, arch = read_architecture(files)
    cuts = method.cuts(peft_config, arch.num_layers) if method else ()

    def make(rngs: Rngs) -> Any:
        make_model = family.MODEL
        if getattr(arch, "num_labels", None):
            make_model = family.CLASSIFIER
        model = make_model(arch, Maker(rngs, jnp.dtype(dtype)), dtype, cuts)
        table = sites(family.rows(arch), model)
        if quantization:
            quantize_model(model, table, quantization, find_trainable(table))
        if matmuls:
            for site in linear_maps(model, table):
                module_at(model, site.module).matmuls = matmuls
        set_way(model, attention)
        if method is not None:
            method.attach(model, table, peft_config, rngs)
        return model

    def find_trainable(table: Sequence[Site]) -> Callable[[str], bool]:
        if method is None:
            return lambda path: False
        return method.is_trainable(peft_config, table)

    model = nnx.eval_shape(lambda: make(Rngs(0)))
    table = sites(family.rows(arch), model)
    graphdef, abstract = tree.split(model)
    trainable = find_trainable(table)
    shapes = {path: p.shape for path, p in abstract.items()}
    shardings = sharding.param_shardings(tree.logical_axes(model), shapes, mesh)
    params = {
        path: jax.ShapeDtypeStruct(
            p.shape,
            jnp.float32 if trainable(path) else p.dtype,
            sharding=shardings[path],
        )
        for path, p in abstract.items()
    }
    return Blueprint(model, graphdef, params, table, make)


def most_common_dtype(files: ModelInfo) -> str:
    """The type that most of a model's weights are stored in.

    Raises:
      UserError: There are no weights, and the config does not say it.
    """
    if _has_weights(files):
        tensors = files.tensors
        return str(Counter(map(tensors.dtype, tensors.names)).most_common(1)[0][0])
    if files.config.dtype is None:
        raise UserError(
            f"the config of {files.source} does not say of which type its weights are; "
            f"set model.dtype to one of {DTYPES[:-1]}"
        )
    return str(files.config.dtype).removeprefix("torch.")

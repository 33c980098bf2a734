"""What a row of a family's name table is, and what it stands for in one model."""

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Any

from flax import nnx

from fjft.models.stack import Stack


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter's name on either side; `{}` is the number of the layer.

    `Row("model.layers.{}.mlp.up_proj.weight", "layers.{}.mlp.up.weight")` says that
    layer 3 of our stacked `mlp.up.weight` is `model.layers.3.mlp.up_proj.weight`.

    Attributes:
      hf: The tensor's name in a Hugging Face checkpoint; a second `{}` is the number
        of the expert.
      path: The parameter's path in our model; what stands before `.{}` is a `Stack`.
      experts: The number of experts stacked behind the layers, 0 for none.
      transpose: Whether the checkpoint has a matrix the other way round, (in, out).
      aliases: Names under which a checkpoint may hold the same values instead, read in
        this order if `hf` is missing, or once more, and then passed over.
      head: Whether it is a part of the head, which a checkpoint may lack.
      group_size: 0, or how many layers a group has where the checkpoint counts them in
        groups: then `hf` has a `{}` for the group and one for the layer in it.
    """

    hf: str
    path: str
    experts: int = 0
    transpose: bool = False
    aliases: tuple[str, ...] = ()
    head: bool = False
    group_size: int = 0


def linear_rows(hf: str, path: str, *, bias: bool = True) -> tuple[Row, ...]:
    """The rows of a linear map: its weight and, if it has one, its bias."""
    leaves = ("weight", "bias") if bias else ("weight",)
    return tuple(Row(f"{hf}.{leaf}", f"{path}.{leaf}") for leaf in leaves)


def norm_rows(hf: str, path: str, *, bias: bool = True) -> tuple[Row, ...]:
    """The rows of a norm, which the oldest checkpoints call gamma and beta."""
    leaves = {"weight": "gamma"} | ({"bias": "beta"} if bias else {})
    return tuple(
        Row(f"{hf}.{leaf}", f"{path}.{leaf}", aliases=(f"{hf}.{old}",))
        for leaf, old in leaves.items()
    )


@dataclasses.dataclass(frozen=True)
class Site:
    """Where a row lies in one model: a parameter, and the tensors stacked in it.

    Attributes:
      path: The parameter's path, `layers.blocks.0.mlp.up.weight`.
      hf_names: The Hugging Face tensors, in the order in which they are stacked.
      lead: The leading axes they are stacked over: `()`, `(L,)` or `(L, experts)`.
      transpose: Whether each of them is the transpose of ours.
      aliases: For each of the tensors, the other names it may have.
      head: Whether it is a part of the head.
    """

    path: str
    hf_names: tuple[str, ...]
    lead: tuple[int, ...]
    transpose: bool = False
    aliases: tuple[tuple[str, ...], ...] = ()
    head: bool = False

    @property
    def module(self) -> str:
        """The path of the module that holds the parameter."""
        return self.path.rpartition(".")[0]

    @property
    def hf_modules(self) -> tuple[str, ...]:
        """The Hugging Face modules that hold the tensors."""
        return tuple(name.rpartition(".")[0] for name in self.hf_names)

    def tensors(self) -> Iterable[tuple[str, tuple[int, ...]]]:
        """Each Hugging Face tensor and its index into the parameter's leading axes."""
        places = itertools.product(*map(range, self.lead))
        return zip(self.hf_names, places, strict=True)

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of each Hugging Face tensor, from the parameter's."""
        rest = shape[len(self.lead) :]
        return rest[::-1] if self.transpose else rest


def module_at(model: nnx.Module, path: str) -> Any:
    """The submodule or parameter at a dotted path."""
    found: Any = model
    for key in path.split("."):
        found = found[int(key)] if key.isdigit() else getattr(found, key)
    return found


def sites(rows: Iterable[Row], model: nnx.Module) -> list[Site]:
    """Lays a table out over the stacks of one model, in the table's order.

    A stacked layer that has None where others have the row's module is left out, as
    the first layer of a model may lack a norm.
    """
    found = []
    for row in rows:
        prefix, is_stacked, rest = row.path.partition(".{}.")
        experts = (row.experts,) if row.experts else ()
        if not is_stacked:
            found.append(_site(row, row.path, [()], experts))
            continue
        stack: Stack = module_at(model, prefix)
        for number, layers in enumerate(stack.layers):
            path = f"{prefix}.blocks.{number}.{rest}"
            if _is_left_out(model, path):
                continue
            found.append(_site(row, path, [(n,) for n in layers], experts))
    return found


def _is_left_out(model: nnx.Module, path: str) -> bool:
    keys = path.split(".")
    parts = [".".join(keys[: i + 1]) for i in range(len(keys))]
    return any(module_at(model, part) is None for part in parts)


def _site(row: Row, path: str, layers: list[tuple], experts: tuple[int, ...]) -> Site:
    numbers = [
        (*(divmod(layer[0], row.group_size) if row.group_size else layer), *expert)
        for layer in layers
        for expert in itertools.product(*map(range, experts))
    ]
    lead = ((len(layers),) if layers != [()] else ()) + experts
    names = tuple(row.hf.format(*number) for number in numbers)
    assert len(names) == math.prod(lead)
    aliases = tuple(tuple(a.format(*n) for a in row.aliases) for n in numbers)
    return Site(path, names, lead, row.transpose, aliases, row.head)

"""What a row of a family's name table is, and what it stands for in one model."""

import dataclasses
from collections.abc import Iterable

from flax import nnx

from fjft.models.layers import Stack


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter's name on either side; `{}` is the number of the layer.

    `Row("model.layers.{}.mlp.up_proj.weight", "layers.{}.mlp.up.weight")` says that
    layer 3 of our stacked `mlp.up.weight` is `model.layers.3.mlp.up_proj.weight`.

    Attributes:
      hf: The tensor's name in a Hugging Face checkpoint.
      path: The parameter's path in our model.
    """

    hf: str
    path: str


@dataclasses.dataclass(frozen=True)
class Site:
    """Where a row lies in one model: a parameter, and the tensors stacked in it.

    Attributes:
      path: The parameter's path, `layers.blocks.0.mlp.up.weight`.
      hf_names: The Hugging Face tensors, in the order in which they are stacked.
      stacked: Whether the parameter has a leading layer axis.
    """

    path: str
    hf_names: tuple[str, ...]
    stacked: bool

    @property
    def module(self) -> str:
        """The path of the module that holds the parameter."""
        return self.path.rpartition(".")[0]

    @property
    def hf_modules(self) -> tuple[str, ...]:
        """The Hugging Face modules that hold the tensors."""
        return tuple(name.rpartition(".")[0] for name in self.hf_names)


def sites(rows: Iterable[Row], model: nnx.Module) -> list[Site]:
    """Lays a table out over the stacks of one model, in the table's order."""
    stack: Stack = model.layers
    found = []
    for row in rows:
        if "{}" not in row.path:
            found.append(Site(row.path, (row.hf,), stacked=False))
            continue
        for number, layers in enumerate(stack.layers):
            path = row.path.format(f"blocks.{number}")
            names = tuple(row.hf.format(layer) for layer in layers)
            found.append(Site(path, names, stacked=True))
    return found

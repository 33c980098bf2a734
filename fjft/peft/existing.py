"""What methods share that leave the model, or most of it, as it stands."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from flax import nnx

from fjft.models.layers import Rngs
from fjft.models.weights import Site, module_at


def cuts(config: Any, num_layers: int) -> tuple[int, ...]:
    """The stack stays whole."""
    del config, num_layers
    return ()


def attach(model: nnx.Module, sites: Sequence[Site], config: Any, rngs: Rngs) -> None:
    """Adds nothing."""
    del model, sites, config, rngs


def count(model: nnx.Module, paths: Iterable[str]) -> int:
    """The number of scalars in parameters of the model."""
    return sum(math.prod(module_at(model, path).shape) for path in paths)

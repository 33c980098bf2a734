"""Full fine-tuning: every weight is trained."""

import dataclasses
from collections.abc import Callable, Sequence

from flax import nnx

from fjft import tree
from fjft.models.weights import Site

PEFT_TYPE = None


@dataclasses.dataclass(frozen=True)
class Config:
    """Full fine-tuning has no options."""


def cuts(config: Config, num_layers: int) -> tuple[int, ...]:
    """The stack stays whole."""
    del config, num_layers
    return ()


def attach(
    model: nnx.Module, sites: Sequence[Site], config: Config, rngs: nnx.Rngs
) -> None:
    """Adds nothing."""
    del model, sites, config, rngs


def is_trainable(config: Config, sites: Sequence[Site]) -> Callable[[str], bool]:
    """Everything is."""
    del config, sites
    return lambda path: True


def num_trainable(model: nnx.Module, sites: Sequence[Site], config: Config) -> int:
    """The number of trained scalars."""
    del sites, config
    return tree.count(tree.split(model)[1])

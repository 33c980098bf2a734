"""Full fine-tuning: every weight is trained."""

import dataclasses
from collections.abc import Callable, Sequence

from flax import nnx

from fjft import tree
from fjft.models.weights import Site
from fjft.peft import existing

PEFT_TYPE = None


@dataclasses.dataclass(frozen=True)
class Config:
    """Full fine-tuning has no options."""


cuts, attach = existing.cuts, existing.attach


def is_trainable(config: Config, sites: Sequence[Site]) -> Callable[[str], bool]:
    """Everything is."""
    del config, sites
    return lambda path: True


def num_trainable(model: nnx.Module, sites: Sequence[Site], config: Config) -> int:
    """The number of trained scalars."""
    del sites, config
    return tree.count(tree.split(model)[1])

"""Trains the last layers, and leaves the ones before them as they are.

The stack is cut in two, so that the frozen layers have neither gradients nor moments
and the backward pass stops where they end.
"""

import dataclasses
from collections.abc import Callable, Sequence

from flax import nnx

from fjft import tree
from fjft.errors import UserError
from fjft.models.weights import Site
from fjft.peft import existing

PEFT_TYPE = None


@dataclasses.dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
      num_layers: The number of layers to train, counted from the end; the norm after
        them is trained too, and so is an encoder's head.
    """

    num_layers: int = 1

    def __post_init__(self):
        if self.num_layers < 1:
            raise UserError(f"peft.num_layers={self.num_layers} is not positive")


def cuts(config: Config, num_layers: int) -> tuple[int, ...]:
    """Cuts before the first layer that is trained.

    Raises:
      UserError: The model has fewer layers.
    """
    if config.num_layers > num_layers:
        raise UserError(
            f"peft.num_layers={config.num_layers} is more than the model's {num_layers}"
        )
    return (num_layers - config.num_layers,)


attach = existing.attach


def is_trainable(config: Config, sites: Sequence[Site]) -> Callable[[str], bool]:
    """Parameters of the last layers, of the norm after them and of the head."""
    # Of an encoder-decoder the last layers are the decoder's.
    half = "decoder." if any(s.path.startswith("decoder.") for s in sites) else ""
    layers = [site for site in sites if site.lead and site.path.startswith(half)]
    total = 1 + max(_layer_number(name) for site in layers for name in site.hf_names)
    first = total - config.num_layers
    trained = {
        site.path for site in sites if site.path.startswith(f"{half}norm.") or site.head
    }
    trained |= {
        site.path
        for site in layers
        if all(_layer_number(name) >= first for name in site.hf_names)
    }
    return trained.__contains__


def _layer_number(hf_name: str) -> int:
    return next(int(part) for part in hf_name.split(".") if part.isdigit())


def num_trainable(model: nnx.Module, sites: Sequence[Site], config: Config) -> int:
    """The number of trained scalars."""
    kept, _ = tree.partition(tree.split(model)[1], is_trainable(config, sites))
    return tree.count(kept)

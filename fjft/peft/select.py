"""Trains the parameters that a regex names, and no others.

PEFT has no format for it, so a trained model is saved whole.
"""

import dataclasses
from collections.abc import Callable, Sequence

from flax import nnx

from fjft.errors import UserError
from fjft.models.weights import Site
from fjft.peft import existing, targets

PEFT_TYPE = None


@dataclasses.dataclass(frozen=True)
class Config:
    r"""Options.

    Attributes:
      parameters: A regex on Hugging Face's names of parameters, that means whole names
        or their last parts: `mlp\..*`, `lm_head.weight`, `(q|v)_proj\.bias`.
    """

    parameters: str = ""

    def __post_init__(self):
        if not self.parameters:
            raise UserError(
                "peft.method=select needs peft.parameters, a regex on the names of "
                r"parameters such as mlp\..*"
            )


cuts, attach = existing.cuts, existing.attach


def is_trainable(config: Config, sites: Sequence[Site]) -> Callable[[str], bool]:
    """What the regex means.

    Raises:
      UserError: It is broken, matches nothing, or means some layers of a stack only.
    """
    return _paths(config, sites).__contains__


def _paths(config: Config, sites: Sequence[Site]) -> frozenset[str]:
    option = "peft.parameters"
    names = [name for site in sites for name in site.hf_names]
    chosen = targets.select(config.parameters, names, option, what="parameter")
    option = f"{option}={config.parameters!r}"
    found = targets.whole_stacks(
        chosen, sites, option, names_of=lambda site: site.hf_names
    )
    return frozenset(site.path for site in found)


def num_trainable(model: nnx.Module, sites: Sequence[Site], config: Config) -> int:
    """The number of trained scalars."""
    return existing.count(model, _paths(config, sites))

"""Trains the parameters that a regex names, or all but those.

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
      freeze: Such a regex on those that are left alone while all others are trained,
        in the place of `parameters`.
    """

    parameters: str = ""
    freeze: str = ""

    def __post_init__(self):
        if bool(self.parameters) == bool(self.freeze):
            raise UserError(
                "peft.method=select needs either peft.parameters or peft.freeze, a "
                r"regex on the names of parameters such as mlp\..*"
            )


cuts, attach = existing.cuts, existing.attach


def is_trainable(config: Config, sites: Sequence[Site]) -> Callable[[str], bool]:
    """What the regex means.

    Raises:
      UserError: It is broken, matches nothing, means some layers of a stack only, or
        leaves nothing to train.
    """
    return _paths(config, sites).__contains__


def _paths(config: Config, sites: Sequence[Site]) -> frozenset[str]:
    option = "peft.parameters" if config.parameters else "peft.freeze"
    pattern = config.parameters or config.freeze
    names = [name for site in sites for name in site.hf_names]
    chosen = targets.select(pattern, names, option, what="parameter")
    found = targets.whole_stacks(
        chosen, sites, f"{option}={pattern!r}", names_of=lambda site: site.hf_names
    )
    named = frozenset(site.path for site in found)
    if config.parameters:
        return named
    trained = frozenset(site.path for site in sites) - named
    if not trained:
        raise UserError(f"{option}={pattern!r} leaves nothing to train; freeze less")
    return trained


def num_trainable(model: nnx.Module, sites: Sequence[Site], config: Config) -> int:
    """The number of trained scalars."""
    return existing.count(model, _paths(config, sites))

"""BitFit: trains the biases that a model has (Ben Zaken et al. 2022).

PEFT has no format for it, so a trained model is saved whole.
"""

import dataclasses
from collections.abc import Callable, Sequence

from flax import nnx

from fjft.errors import UserError
from fjft.models.weights import Site
from fjft.peft import existing, saved

PEFT_TYPE = None


@dataclasses.dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
      modules_to_save: A regex on names of modules that are trained whole, as a
        classifier is in the paper; "" is none.
    """

    modules_to_save: str = ""


cuts, attach = existing.cuts, existing.attach


def is_trainable(config: Config, sites: Sequence[Site]) -> Callable[[str], bool]:
    """Every bias, those of norms included, and what `modules_to_save` means.

    Raises:
      UserError: The model has no biases.
    """
    return _paths(config, sites).__contains__


def _paths(config: Config, sites: Sequence[Site]) -> frozenset[str]:
    biases = frozenset(s.path for s in sites if s.path.endswith(".bias"))
    if not biases:
        raise UserError(
            "peft.method=bitfit trains biases, and this model has none; use "
            "peft.method=layer_norm or ia3, which train about as few parameters"
        )
    return biases | saved.paths(config.modules_to_save, sites)


def num_trainable(model: nnx.Module, sites: Sequence[Site], config: Config) -> int:
    """The number of trained scalars."""
    return existing.count(model, _paths(config, sites))

"""What a method may add to the optimizer's step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from fjft.tree import Params


@dataclasses.dataclass(frozen=True)
class StepRule:
    """A term of the loss, and a change of the parameters after each update.

    All of it is traced into the one compiled step. Its state is donated to the step and
    saved with the parameters; an array of it that stands under a parameter's path, and
    has its shape, lies on the devices as the parameter does.

    Attributes:
      penalty: `params -> scalar`, added once a step to the mean loss whose gradient is
        taken. It is no part of the loss that is logged.
      init: `params -> state`, a pytree of arrays.
      after_update: `(state, params, grads, step) -> (state, params)`: takes the
        optimizer's new parameters, the gradients that led to them (mean and clipped)
        and the number of steps done before this one, an int32 scalar.
    """

    penalty: Callable[[Params], jax.Array]
    init: Callable[[Params], Any]
    after_update: Callable[[Any, Params, Params, jax.Array], tuple[Any, Params]]

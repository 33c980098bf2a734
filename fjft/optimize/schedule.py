"""Learning-rate schedules under transformers' names, equal to transformers' numbers.

A schedule is a pure function from the step to the learning rate. The step counts
from 0, may be a Python int or an int32 array, and the function may be traced, so the
optimizer evaluates it inside the compiled step and the loop evaluates it to log.
With a warmup, step 0 has the learning rate 0, as in transformers.

The rates of all steps are computed at once, in float64 as transformers does, and the
schedule looks its step up: float32 arithmetic inside the step would lose digits where
a cosine nears its end, and four bytes a step are nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fjft.errors import UserError

Schedule = Callable[[ArrayLike], Any]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What a schedule needs; `optimizer.Config` carries these fields.

    Attributes:
      learning_rate: The peak.
      schedule: One of `SCHEDULES`.
      warmup_steps: Steps of linear warmup: a count, or below 1 a fraction of all
        steps, rounded up.
      min_lr_ratio: The floor as a fraction of the peak; for `cosine_with_min_lr` and
        `warmup_stable_decay`. In the latter the warmup starts at the floor too.
      num_decay_steps: Length of `warmup_stable_decay`'s last phase, a count or a
        fraction like `warmup_steps`. transformers has no default here.
      decay_type: Shape of that phase: `cosine`, `linear` or `1-sqrt`.
      lr_end: Where `polynomial` ends, as an absolute learning rate.
      power: Exponent of `polynomial`.
      timescale: Steps over which `inverse_sqrt` decays; 0 means the warmup's length,
        or 10,000 without one.
    """

    learning_rate: float = 5e-5
    schedule: str = "linear"
    warmup_steps: float = 0.0
    min_lr_ratio: float = 0.0
    num_decay_steps: float = 0.1
    decay_type: str = "cosine"
    lr_end: float = 1e-7
    power: float = 1.0
    timescale: int = 0


def count_steps(steps: float, total_steps: int) -> int:
    """Turns a count or a fraction into a count, as transformers does.

    Args:
      steps: At least 1: a count. Below 1: a fraction of `total_steps`, rounded up.
      total_steps: Optimizer steps of the whole run.

    Returns:
      The count: `count_steps(0.1, 25)` is 3, `count_steps(7, 25)` is 7.
    """
    return int(steps) if steps >= 1 else math.ceil(total_steps * steps)


def make_schedule(config: Config, total_steps: int) -> Schedule:
    """Makes the schedule that `config` names.

    Args:
      config: Which schedule, with its numbers.
      total_steps: Optimizer steps of the whole run, not of what is left after a
        resume.

    Returns:
      step (int or int32 array, from 0) -> learning rate (float32, shaped like step).
      Steps past the end have the rate of step `total_steps`.

    Raises:
      UserError: An unknown name, or numbers that the schedule cannot or would not
        use.
    """
    rates = compute_rates(config, total_steps).astype(np.float32)

    def schedule(step: ArrayLike) -> ArrayLike:
        if isinstance(step, int):  # The host asks, and shall not wait for a device.
            return rates[min(step, total_steps)]
        return jnp.asarray(rates)[jnp.minimum(step, total_steps)]

    return schedule


def compute_rates(config: Config, total_steps: int) -> np.ndarray:
    """Computes the learning rates of steps 0 to `total_steps`.

    Args:
      config: Which schedule, with its numbers.
      total_steps: Optimizer steps of the whole run.

    Returns:
      float64 [total_steps + 1]; the run itself uses all but the last.

    Raises:
      UserError: As in `make_schedule`.
    """
    _check(config, total_steps)
    warmup = count_steps(config.warmup_steps, total_steps)
    if warmup > total_steps:
        raise UserError(
            f"optimizer.warmup_steps {config.warmup_steps} is more than the run's "
            f"{total_steps} steps; use a fraction such as 0.1, or train longer"
        )
    steps = np.arange(total_steps + 1, dtype=np.float64)
    rising = steps / max(1, warmup)
    if config.schedule == "warmup_stable_decay":
        rising = config.min_lr_ratio + (1.0 - config.min_lr_ratio) * rising
    past = np.maximum(steps - warmup, 0.0)
    falling = SCHEDULES[config.schedule](past, warmup, total_steps, config)
    return config.learning_rate * np.where(steps < warmup, rising, falling)


def _check(config: Config, total_steps: int) -> None:
    """Refuses what would fail deep inside, or would be ignored without a word."""
    name = config.schedule
    if name not in SCHEDULES:
        raise UserError(
            f"unknown optimizer.schedule {name!r}; use one of {', '.join(SCHEDULES)}"
        )
    if total_steps < 1:
        raise UserError(
            f"a schedule over {total_steps} steps is empty; train for at least 1 step"
        )
    if config.learning_rate <= 0 or config.warmup_steps < 0:
        raise UserError(
            f"optimizer.learning_rate {config.learning_rate} must be positive and "
            f"optimizer.warmup_steps {config.warmup_steps} not negative"
        )
    if name == "constant" and config.warmup_steps:
        raise UserError(
            f"optimizer.schedule 'constant' ignores warmup_steps="
            f"{config.warmup_steps}; use 'constant_with_warmup' or warmup_steps=0"
        )
    if config.min_lr_ratio and name not in USE_MIN_LR_RATIO:
        raise UserError(
            f"optimizer.schedule {name!r} ignores min_lr_ratio="
            f"{config.min_lr_ratio}; use one of {', '.join(USE_MIN_LR_RATIO)}"
        )


# Each function below: steps past the warmup, the warmup's length, the run's length
# -> rates as fractions of the peak.


def _constant(past, warmup, total_steps, config: Config) -> np.ndarray:
    del warmup, total_steps, config
    return np.ones_like(past)


def _linear(past, warmup, total_steps, config: Config) -> np.ndarray:
    del config
    return 1.0 - past / max(1, total_steps - warmup)


def _cosine(past, warmup, total_steps, config: Config) -> np.ndarray:
    progress = past / max(1, total_steps - warmup)
    factor = 0.5 * (1.0 + np.cos(math.pi * progress))
    return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * factor


def _inverse_sqrt(past, warmup, total_steps, config: Config) -> np.ndarray:
    del total_steps
    timescale = config.timescale or warmup or 10_000
    return 1.0 / np.sqrt((past + timescale) / timescale)


def _polynomial(past, warmup, total_steps, config: Config) -> np.ndarray:
    end = config.lr_end / config.learning_rate
    if end >= 1:
        raise UserError(
            f"optimizer.lr_end {config.lr_end} must be below optimizer.learning_rate "
            f"{config.learning_rate}"
        )
    left = 1.0 - past / max(1, total_steps - warmup)
    return end + (1.0 - end) * left**config.power


def _warmup_stable_decay(past, warmup, total_steps, config: Config) -> np.ndarray:
    if config.decay_type not in DECAY_TYPES:
        raise UserError(
            f"unknown optimizer.decay_type {config.decay_type!r}; "
            f"use one of {', '.join(DECAY_TYPES)}"
        )
    decay = count_steps(config.num_decay_steps, total_steps)
    stable = total_steps - warmup - decay
    if stable < 0:
        raise UserError(
            f"{warmup} warmup and {decay} decay steps do not fit into {total_steps} "
            f"steps; lower optimizer.warmup_steps or optimizer.num_decay_steps"
        )
    progress = np.maximum(past - stable, 0.0) / max(1, decay)
    factor = DECAY_TYPES[config.decay_type](progress)
    return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * factor


DECAY_TYPES = {
    "cosine": lambda progress: 0.5 * (1.0 + np.cos(math.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
    "1-sqrt": lambda progress: 1.0 - np.sqrt(progress),
}

SCHEDULES = {
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_min_lr": _cosine,
    "constant": _constant,
    "constant_with_warmup": _constant,
    "inverse_sqrt": _inverse_sqrt,
    "warmup_stable_decay": _warmup_stable_decay,
    "polynomial": _polynomial,
}

USE_MIN_LR_RATIO = ("cosine_with_min_lr", "warmup_stable_decay")

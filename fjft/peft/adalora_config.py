"""AdaLoRA's options, and what of PEFT's `adapter_config.json` they stand for."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fjft.errors import UserError
from fjft.peft import lora, targets

# What PEFT writes behind a module's name in a rank pattern.
_SINGULAR_VALUES = ".lora_E"


@dataclasses.dataclass(frozen=True)
class Config:
    """Options, under PEFT's names.

    Attributes:
      init_r: The rank that every adapter starts with.
      target_r: The mean rank that is left at the end.
      lora_alpha: The adapter's output is scaled by `lora_alpha / init_r`, also when
        its rank has become another.
      lora_dropout: Share of the adapter's input that is dropped in training.
      target_modules: `all-linear`, or a regex on Hugging Face module names.
      tinit: Steps before any rank is taken away.
      tfinal: Steps at the end in which the ranks stay as they are.
      deltaT: Steps between two allocations of the budget.
      beta1: Decay of the running mean of a parameter's sensitivity.
      beta2: Decay of that of its uncertainty.
      orth_reg_weight: Weight of the penalty that keeps the rows of A and the columns of
        B orthonormal.
      total_step: Steps in which all this happens; 0 is the whole run.
      modules_to_save: A regex on names of modules that are trained whole; "" is none.
      rank_pattern: Which of its `init_r` triplets each module has kept. Training finds
        it; a config leaves it empty.
    """

    init_r: int = 12
    target_r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str = targets.ALL_LINEAR
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1  # noqa: N815, PEFT's name
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int = 0
    modules_to_save: str = ""
    rank_pattern: Mapping[str, tuple[bool, ...]] = dataclasses.field(
        default_factory=dict
    )

    def __post_init__(self):
        if self.init_r < 1 or self.lora_alpha <= 0:
            raise UserError(
                f"peft.init_r={self.init_r} must be at least 1 and "
                f"peft.lora_alpha={self.lora_alpha} positive"
            )
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"peft.lora_dropout={self.lora_dropout} is not in [0, 1)")

    def kept(self, module: str) -> tuple[bool, ...]:
        """Which triplets the module with this Hugging Face name has."""
        return self.rank_pattern.get(module, (True,) * self.init_r)


def for_training(config: Config, total_steps: int) -> Config:
    """The options with the steps of a run filled in.

    Args:
      config: The options.
      total_steps: Optimizer steps of the run.

    Raises:
      UserError: No budget can be allocated so.
    """
    c = dataclasses.replace(config, total_step=config.total_step or total_steps)
    if c.rank_pattern:
        raise UserError("peft.rank_pattern is what training finds; leave it empty")
    if not 1 <= c.target_r < c.init_r:
        raise UserError(
            f"peft.target_r={c.target_r} must be at least 1 and less than "
            f"peft.init_r={c.init_r}, or there is no rank to take away"
        )
    if min(c.tinit, c.tfinal) < 0 or c.deltaT < 1:
        raise UserError(
            f"peft.tinit={c.tinit} and peft.tfinal={c.tfinal} must not be negative, "
            f"and peft.deltaT={c.deltaT} at least 1"
        )
    if not c.tinit + c.tfinal < c.total_step <= total_steps:
        raise UserError(
            f"peft.tinit={c.tinit} and peft.tfinal={c.tfinal} leave no step of "
            f"peft.total_step={c.total_step} in which ranks are taken away, or the "
            f"run's {total_steps} steps end before; use tinit + tfinal < total_step, "
            f"and total_step=0 or at most {total_steps}"
        )
    if not (0 < c.beta1 < 1 and 0 < c.beta2 < 1):
        raise UserError(
            f"peft.beta1={c.beta1} and peft.beta2={c.beta2} must lie between 0 and 1"
        )
    if c.orth_reg_weight < 0:
        raise UserError(f"peft.orth_reg_weight={c.orth_reg_weight} is negative")
    return c


def to_peft(config: Config) -> dict[str, Any]:
    """The options' part of PEFT's `adapter_config.json`."""
    fields = {field.name for field in dataclasses.fields(Config)}
    described: dict[str, Any] = {
        name: getattr(config, name)
        for name in sorted(fields - {"target_modules", "modules_to_save"})
    }
    # PEFT wants a schedule with a step in it, also where nothing is trained any more.
    described["total_step"] = config.total_step or config.tinit + config.tfinal + 1
    described["rank_pattern"] = {
        f"{module}{_SINGULAR_VALUES}": list(kept)
        for module, kept in config.rank_pattern.items()
    } or None
    return described


def from_peft(adapter_config: Mapping[str, Any]) -> Config:
    """The options that an `adapter_config.json` stands for.

    Raises:
      UserError: It uses a part of PEFT's AdaLoRA that is not implemented.
    """
    # PEFT's AdaLoraConfig is a LoraConfig with more in it.
    names = {field.name for field in dataclasses.fields(Config)}
    names -= {field.name for field in dataclasses.fields(lora.Config)} - {
        "rank_pattern"
    }
    own = {name: adapter_config[name] for name in names & set(adapter_config)}
    rest = lora.from_peft({k: v for k, v in adapter_config.items() if k not in names})
    own["rank_pattern"] = {
        name.partition(_SINGULAR_VALUES)[0]: tuple(kept)
        for name, kept in (own["rank_pattern"] or {}).items()
    }
    return Config(
        **own,
        lora_alpha=rest.lora_alpha,
        lora_dropout=rest.lora_dropout,
        target_modules=rest.target_modules,
        modules_to_save=rest.modules_to_save,
    )

"""LoRA's options, and what of PEFT's `adapter_config.json` they stand for."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fjft.errors import UserError
from fjft.peft import options, starts, targets


@dataclasses.dataclass(frozen=True)
class Config:
    """Options, under PEFT's names.

    Attributes:
      r: Rank.
      lora_alpha: The adapter's output is scaled by `lora_alpha / r`.
      lora_dropout: Share of the adapter's input that is dropped in training.
      target_modules: `all-linear`, or a regex on Hugging Face module names, which may
        mean `lm_head` and the table of tokens, `embed_tokens`, too.
      use_rslora: Scales by `lora_alpha / sqrt(r)` instead (Kalajdzievski 2023).
      use_dora: Trains the lengths of the weight's rows by themselves (Liu et al. 2024).
      init_lora_weights: How A and B start. `default`: A random and B zero. From the
        weight itself, whose part they then are: `pissa` or, much faster,
        `pissa_niter_4` (Meng et al. 2024), or `olora` (Buyukakyuz 2024). What is
        saved is a plain LoRA of twice the rank, for the base as it was. From what
        quantization took away from the weight: `loftq` (Li et al. 2023, with one
        iteration, so that the base's codes stay); what is saved is for the quantized
        base, and what is merged leaves the start out.
      loraplus_lr_ratio: The learning rate of B, and of what is trained that has one
        axis, over the optimizer's, which is A's (Hayou et al. 2024); 1 in plain LoRA.
      loraplus_lr_embedding: The learning rate of what adapts a table of tokens; 0 is
        the optimizer's.
      rank_pattern: Ranks of the modules that a regex means, instead of `r`.
      alpha_pattern: The same for `lora_alpha`.
      modules_to_save: A regex on names of modules that are trained whole; "" is none.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str = targets.ALL_LINEAR
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: str = starts.DEFAULT
    loraplus_lr_ratio: float = 1.0
    loraplus_lr_embedding: float = 0.0
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    modules_to_save: str = ""

    def __post_init__(self):
        if self.r < 1 or any(r < 1 for r in self.rank_pattern.values()):
            raise UserError(
                f"peft.r={self.r}, rank_pattern={dict(self.rank_pattern)}: "
                "ranks are at least 1"
            )
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"peft.lora_dropout={self.lora_dropout} is not in [0, 1)")
        if self.loraplus_lr_ratio <= 0:
            raise UserError(
                f"peft.loraplus_lr_ratio={self.loraplus_lr_ratio} is not positive; the "
                "paper advises 2 to 16"
            )
        if not starts.is_name(self.init_lora_weights):
            raise UserError(
                f"peft.init_lora_weights={self.init_lora_weights!r} is unknown; use "
                f"one of {starts.NAMES}"
            )

    @property
    def has_start(self) -> bool:
        """Whether A and B start as a part of the weight."""
        begin = self.init_lora_weights
        return begin != starts.DEFAULT and not starts.is_loftq(begin)

    @property
    def is_loftq(self) -> bool:
        """Whether they start as what quantization took away from it."""
        return starts.is_loftq(self.init_lora_weights)

    def plain(self) -> "Config":
        """The options of the LoRA of twice the rank that has no start."""
        wider = math.sqrt(2) if self.use_rslora else 2
        return dataclasses.replace(
            self,
            r=2 * self.r,
            lora_alpha=wider * self.lora_alpha,
            rank_pattern={k: 2 * r for k, r in self.rank_pattern.items()},
            alpha_pattern={k: wider * a for k, a in self.alpha_pattern.items()},
            init_lora_weights=starts.DEFAULT,
        )

    def rank(self, module: str) -> int:
        """The rank of the module with this Hugging Face name."""
        return targets.lookup(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """What the output of the module's adapter is multiplied by."""
        rank = self.rank(module)
        alpha = targets.lookup(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


# Keys of PEFT's LoraConfig that leave what the adapter computes as it is.
_HARMLESS = ("loftq_config", "megatron_core", "qalora_group_size")

# What an adapter for a quantized base says of itself in its file, such as `loftq_nf4`.
LOFTQ_KEY = "fjft_start"

# PEFT's ways to start from which A and B do not depend on the weight.
_FREE_STARTS = (True, False, "gaussian", "orthogonal", "eva")


def from_peft(adapter_config: Mapping[str, Any]) -> Config:
    """The options that an `adapter_config.json` stands for.

    Raises:
      UserError: It uses a part of PEFT's LoRA that is not implemented.
    """
    rest = dict(adapter_config)
    start = rest.pop("init_lora_weights", True)
    start = rest.pop(LOFTQ_KEY, start)
    if start in _FREE_STARTS:
        start = starts.DEFAULT
    elif not starts.is_name(str(start)) or start == starts.LOFTQ:
        raise UserError(
            f"the adapter has init_lora_weights={start!r}, which changes the base "
            "too; save it as plain LoRA with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    layers = rest.pop("layers_to_transform", None), rest.pop("layers_pattern", None)
    rest["target_modules"] = _in_layers(
        options.as_regex(rest["target_modules"]), *layers
    )
    rest["init_lora_weights"] = start
    return options.read(Config, rest, patterns=("modules_to_save",), harmless=_HARMLESS)


def _in_layers(
    modules: str, layers: int | Sequence[int] | None, stack: str | Sequence[str] | None
) -> str:
    """A regex on modules, limited to PEFT's `layers_to_transform`, if there are any."""
    if layers is None or layers == []:
        return modules
    numbers = "|".join(map(str, [layers] if isinstance(layers, int) else layers))
    names = "|".join([stack] if isinstance(stack, str) else stack or [r"[^.]*"])
    return rf"({names})\.({numbers})\.(.*\.)?({modules})"

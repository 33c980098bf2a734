"""Every method's variants, each with the model of `peft` or torch that it must equal.

A new entry of `METHODS` needs one here, and gets the whole of `test_battery.py`.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import bases
import peft
import peft_twins
import torch

UNTIED, TIED = "llama/llama3-rope-biases", "qwen2/no-window-tied"
CLASSIFIER = "bert/tanh-gelu/sequence_classification"
T5 = "t5/gated-own-head"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A variant of a method.

    Attributes:
      base: The tiny model it is tried on, see `bases.make_base`.
      options: Of our `Config`.
      make_theirs: Makes, of a copy of the torch model, one with the same method, in
        which what requires a gradient is what the method trains.
      trained: The trained parameters of such a model, by the names of the method's
        files (by Hugging Face's where it has none of its own).
      starts_as_base: Whether a new model computes what the bare one does.
      is_written_as_it_is: Whether its files hold the trained parameters themselves.
      merges: Whether `merge_adapter` can fold it into the weights.
      rows: The lengths of the segments of each row of a batch.
      sum_loss: The oracle's loss where it is not the base's own.
      learning_rate: The highest of the twenty steps.
    """

    base: str
    options: Mapping[str, Any]
    make_theirs: Callable[[Any], Any]
    trained: Callable[[Any], dict[str, Any]] = peft_twins.trained_by_peft
    starts_as_base: bool = True
    is_written_as_it_is: bool = True
    merges: bool = True
    rows: list[list[int]] = dataclasses.field(default_factory=lambda: bases.ROWS)
    sum_loss: Callable[[Any, bases.Batch, int], torch.Tensor] | None = None
    learning_rate: float = 3e-3


def by_peft(make_config: Callable[..., Any], **options: Any) -> Callable[[Any], Any]:
    """What `peft` makes of a torch model."""

    def make(twin: Any) -> Any:
        return peft.get_peft_model(twin, make_config(**options))

    return make


def by_names(chosen: Callable[[str], bool]) -> Callable[[Any], Any]:
    """A torch model of which only the parameters of chosen names are trained."""

    def make(twin: Any) -> Any:
        for name, parameter in twin.named_parameters():
            parameter.requires_grad_(chosen(name))
        return twin

    return make


def _lora(base: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Case:
    common = {"r": 3, "lora_alpha": 7}
    make_theirs = by_peft(peft.LoraConfig, **common, **theirs)
    return Case(base=base, options=common | dict(ours), make_theirs=make_theirs)


def _same_lora(base: str, **options: Any) -> Case:
    return _lora(base, options, options)


_PATTERNS = {
    "rank_pattern": {"q_proj": 5, r"layers\.1\.self_attn\.v_proj": 2},
    "alpha_pattern": {r"layers\.[02]\.mlp\.up_proj": 3, "v_proj": 40},
}

# Key of `METHODS` -> variant -> case.
CASES: dict[str, dict[str, Case]] = {
    "full": {
        "llama": Case(
            base=UNTIED,
            options={},
            make_theirs=by_names(lambda name: True),
            trained=peft_twins.trained_by_torch,
        ),
    },
    "last_layers": {
        "two": Case(
            base=UNTIED,
            options={"num_layers": 2},
            make_theirs=by_names(
                lambda name: name.startswith(
                    ("model.layers.1.", "model.layers.2.", "model.norm.")
                )
            ),
            trained=peft_twins.trained_by_torch,
        ),
    },
    "lora": {
        "patterns": _same_lora(UNTIED, target_modules="all-linear", **_PATTERNS),
        "dora": _same_lora(
            UNTIED, target_modules="all-linear", use_dora=True, **_PATTERNS
        ),
        "olora": dataclasses.replace(
            _lora(
                UNTIED,
                {"target_modules": ["v_proj", "up_proj"], "init_lora_weights": "olora"},
                {"target_modules": "v_proj|up_proj", "init_lora_weights": "olora"},
            ),
            is_written_as_it_is=False,
        ),
        "rslora-tied": _same_lora(TIED, target_modules="all-linear", use_rslora=True),
        "lm-head-trained-whole": _lora(
            UNTIED,
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            {"target_modules": "q_proj", "modules_to_save": "lm_head"},
        ),
        "classifier": _lora(
            CLASSIFIER,
            {
                "target_modules": r".*encoder.*(query|dense)",
                "modules_to_save": ["classifier"],
                "task_type": "SEQ_CLS",
            },
            {
                "target_modules": r".*encoder.*(query|dense)",
                "modules_to_save": "classifier",
            },
        ),
        "t5": _lora(
            T5,
            {"target_modules": ["q", "v", "wo"], "task_type": "SEQ_2_SEQ_LM"},
            {"target_modules": "q|v|wo"},
        ),
    },
}
IDS = [f"{method}/{variant}" for method, cases in CASES.items() for variant in cases]


def get_case(name: str) -> tuple[str, Case]:
    """The method's key and the case of `method/variant`."""
    method, _, variant = name.partition("/")
    return method, CASES[method][variant]


def make_theirs(case: Case, base: bases.Base, seed: int = 0) -> Any:
    """The oracle as it starts."""
    torch.manual_seed(seed)
    return case.make_theirs(copy.deepcopy(base.twin)).eval()

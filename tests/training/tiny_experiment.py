"""Tiny pretrained models on disk, with a real tokenizer, and configs that train them.

Text is real small talk; the tokenizer is a byte-level BPE with a ChatML template,
trained on it in the blink of an eye. Also a program, that a test may kill:

    python tests/training/tiny_experiment.py SOURCE DIRECTORY '{"train.max_steps": 3}'

which is one of several that train together where the environment says so.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

TEXT = "package:chatterbot_corpus/data/english/*.yml"
VOCAB_SIZE = 384
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "rms_norm_eps": 1e-4,
    "rope_theta": 3000.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def save_tokenizer(directory: Path) -> None:
    """Trains the tokenizer on the corpus and writes it."""
    import tokenizers
    import transformers

    from fjft.sources import resolve_package

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        show_progress=False,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    files = [path.read_text("utf-8") for path in resolve_package(TEXT)]
    backend.train_from_iterator(files, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)


def save_tiny_model(directory: Path, family: str = "llama", seed: int = 0) -> str:
    """Writes a tiny random model of a family; returns its source."""
    import numpy as np
    import torch
    import transformers

    if family == "llama":
        config = transformers.LlamaConfig(**SHAPE, tie_word_embeddings=False)
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.Qwen3Config(
            **SHAPE, head_dim=16, tie_word_embeddings=True
        )
        model = transformers.Qwen3ForCausalLM(config)
    # numpy promises that this generator's numbers never change, torch does not.
    random = np.random.RandomState(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            # Norms of exactly one would hide a norm that is not applied.
            mean = 1.0 if "norm" in name else 0.0
            drawn = mean + 0.1 * random.standard_normal(parameter.shape)
            parameter.copy_(torch.tensor(drawn))
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return str(directory)


def make_config(
    source: str, directory: Path | str, **overrides: Any
) -> ml_collections.ConfigDict:
    """A LoRA run of a few steps; `train__max_steps=3` overrides `train.max_steps`."""
    from fjft.build import override

    config = ml_collections.ConfigDict()
    config.model = {"source": source, "dtype": "float32", "remat": "none"}
    config.peft = {"method": "lora", "r": 8, "lora_alpha": 16.0, "lora_dropout": 0.0}
    config.data = {
        "train": TEXT,
        "eval_size": 16.0,
        "max_length": 96,
        "packing": True,
    }
    config.objective = {"name": "causal_lm", "chunk_tokens": 512}
    config.optimizer = {
        "name": "adamw",
        "learning_rate": 5e-3,
        "schedule": "linear",
        "warmup_steps": 3.0,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
    }
    config.mesh = {"data": 1, "fsdp": 1, "tensor": 1}
    config.train = {
        "batch_size": 8,
        "accumulation_steps": 1,
        "max_steps": 20,
        "num_epochs": 1.0,
        "seed": 0,
        "log_steps": 1,
    }
    config.evaluate = {"eval_steps": 0, "prompt": ""}
    config.checkpoint = {
        "directory": str(directory),
        "save_steps": 0,
        "save_total_limit": 2,
        "resume": False,
    }
    values = {name.replace("__", "."): value for name, value in overrides.items()}
    if values.pop("peft.method", "lora") == "full":
        config.peft = {"method": "full"}
    override(config, values)
    return config


def run_config(
    name: str, directory: Path, defaults: Mapping[str, Any], **overrides: Any
) -> ml_collections.ConfigDict:
    """A file of `configs/` with a test's own settings, small and on one device.

    Args:
      name: The file.
      directory: Where the run writes.
      defaults: Values by dotted key.
      **overrides: More of them, with `__` for each dot.
    """
    import fjft

    few = {
        "mesh.fsdp": 1,
        "train.batch_size": 8,
        "checkpoint.directory": str(directory),
    }
    named = {name.replace("__", "."): value for name, value in overrides.items()}
    return fjft.load_config(f"configs/{name}", few | dict(defaults) | named)


@dataclasses.dataclass(frozen=True)
class Started:
    """A run before its first step; `mesh` is to be set where its steps are taken."""

    run: Any
    state: Any
    mesh: Any


def start(
    config: ml_collections.ConfigDict, mesh: Sequence[int] = (1, 1, 1)
) -> Started:
    """Does what `fjft.train` does before its loop, without files or screen."""
    import jax

    from fjft import sharding
    from fjft.build import build_experiment
    from fjft.training.run import build_run

    experiment = build_experiment(config)
    lies_on = sharding.make_mesh(sharding.Config(*mesh))
    files = experiment.open_model()
    rows, held_out, _ = experiment.load_examples(files.load_tokenizer())
    with jax.set_mesh(lies_on):
        run, state = build_run(experiment, lies_on, files, rows, held_out)
    return Started(run, state, lies_on)


def take_steps(started: Started, num_steps: int) -> tuple[Any, list[Any]]:
    """Takes steps from the first batch on; returns the state and each one's metrics."""
    import jax

    state, rows = started.state, []
    with jax.set_mesh(started.mesh):
        for _, batch in zip(range(num_steps), started.run.batches(), strict=False):
            state, metrics = started.run.train_step(state, started.run.frozen, batch)
            rows.append(jax.device_get(metrics))
    return state, rows


def losses(metrics: Sequence[Any]) -> list[float]:
    """Each step's mean loss."""
    return [float(m.loss_sum / m.weight_sum) for m in metrics]


def assert_cuts_change_nothing(config: ml_collections.ConfigDict) -> None:
    """Three steps in microbatches, on a mesh of every axis, are those of whole ones."""
    import numpy as np

    from fjft.build import override

    _, plain = take_steps(start(config), 3)
    override(config, {"train.accumulation_steps": 2})
    _, cut = take_steps(start(config, (2, 2, 2)), 3)
    np.testing.assert_allclose(losses(cut), losses(plain), rtol=1e-4)


def main() -> int:
    """Trains, and says a user's mistake in one line, as the command line does."""
    from fjft.errors import UserError
    from fjft.training.loop import train

    source, directory, overrides = sys.argv[1:]
    names = {k.replace(".", "__"): v for k, v in json.loads(overrides).items()}
    try:
        train(make_config(source, directory, **names))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

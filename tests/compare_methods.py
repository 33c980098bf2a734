"""Trains one model in every way there is, and sets the results side by side.

    python tests/compare_methods.py [--task=minilm] [--only='lora;adalora']

SmolLM2-135M-Instruct learns to chat, or MiniLM sentiments of tweets, from the same rows
in the same order for every entry of `METHODS`, and for LoRA over a quantized base. Each
has a process of its own, so that peaks of memory are its own. What one leaves is kept
in `--output` as JSON and not done again, so the command may be stopped and started; the
Markdown table and the plot are made of what is there. Speeds mean something on a quiet
machine alone, and without an accelerator JAX_PLATFORMS=cpu spares each process the
search for one.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]


class Task(NamedTuple):
    """A model and what it learns.

    Attributes:
      title: Says so in the table.
      config: A file of `configs/`.
      settings: What all methods have in common.
      score: The metric of held-out data that is shown beside the loss.
      new: The module that the checkpoint lacks, which is trained in every way.
      ways: The peak learning rate and options of each way; a method without an entry
        is tried with its defaults. Fewer trained numbers want larger steps.
    """

    title: str
    config: str
    settings: dict[str, Any]
    score: str
    new: str
    ways: dict[str, dict[str, Any]]


ADALORA = {
    "peft.init_r": 12,
    "peft.target_r": 8,
    "peft.lora_alpha": 24.0,
    "peft.orth_reg_weight": 0.1,
}
LORA = {"peft.method": "lora", "peft.r": 8, "peft.lora_alpha": 16.0}
TASKS = {
    "smollm2": Task(
        "SmolLM2-135M-Instruct, chat, float32",
        "smollm2_lora_quickstart.py",
        {"data.max_length": 128, "train.batch_size": 4, "train.max_steps": 40},
        "eval_mean_token_accuracy",
        "",
        {
            "full": {"optimizer.learning_rate": 5e-5},
            "last_layers": {"peft.num_layers": 4, "optimizer.learning_rate": 3e-4},
            "lora": LORA,
            "lora, nf4": LORA | {"model.quantization": "nf4"},
            "adalora": ADALORA | {"optimizer.learning_rate": 3e-3},
            "select": {
                "peft.parameters": r".*v_proj\.weight",
                "optimizer.learning_rate": 3e-4,
            },
            "prompt": {"optimizer.learning_rate": 3e-2},
            "vera": {"optimizer.learning_rate": 3e-2},
            "p_tuning": {"optimizer.learning_rate": 3e-3},
            "prefix": {"optimizer.learning_rate": 1e-2},
            # The tokens that begin and end a turn, and the end of a line.
            "trainable_tokens": {
                "peft.token_indices": (1, 2, 198),
                "optimizer.learning_rate": 3e-3,
            },
            "bottleneck": {"optimizer.learning_rate": 1e-3},
        },
    ),
    "minilm": Task(
        "MiniLM-L6, sentiment of tweets, float32",
        "minilm_sentiment.py",
        {
            "data.max_length": 128,
            "data.eval_size": 500.0,
            "train.batch_size": 16,
            "train.max_steps": 60,
            "train.log_steps": 5,
            "optimizer.learning_rate": 2e-3,
        },
        "eval_accuracy",
        "classifier",
        {
            "full": {"optimizer.learning_rate": 1e-4},
            "last_layers": {"peft.num_layers": 2, "optimizer.learning_rate": 3e-4},
            "lora": LORA,
            "lora, nf4": LORA | {"model.quantization": "nf4"},
            "adalora": ADALORA | {"optimizer.learning_rate": 5e-3},
            "select": {
                "peft.parameters": r".*self\.value\.weight|classifier\..*",
                "optimizer.learning_rate": 3e-4,
            },
            "head alone": {
                "peft.method": "select",
                "peft.parameters": r"classifier\..*",
                "optimizer.learning_rate": 1e-2,
            },
            "prompt": {"optimizer.learning_rate": 1e-2},
            "vera": {"optimizer.learning_rate": 2e-2},
            "prefix": {"optimizer.learning_rate": 1e-2},
            "trainable_tokens": {"peft.token_indices": (101, 102)},
        },
    ),
}


def main() -> None:
    """Runs what has no result yet, then writes the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=TASKS, default="smollm2")
    parser.add_argument("--steps", type=int, help="optimizer steps")
    parser.add_argument("--only", help="ways, with semicolons; all by default")
    parser.add_argument("--output", default=str(ROOT / "runs" / "compare_methods"))
    parser.add_argument("--plot", help="default: .assets/methods_TASK.png")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.run:
        return print(json.dumps(train(flags.run, TASKS[flags.task], settings(flags))))
    from fjft.peft.methods import METHODS

    every = dict.fromkeys([*METHODS, *TASKS[flags.task].ways])
    names = flags.only.split(";") if flags.only else list(every)
    results, failed = {}, []
    for name in names:
        result = find(name, flags)
        if result is None:
            failed.append(name)
        else:
            results[name] = result
    if results:
        table = describe(results, flags)
        print(table)
        Path(flags.output, f"{flags.task}.md").write_text(table + "\n", "utf-8")
        plot = flags.plot or ROOT / ".assets" / f"methods_{flags.task}.png"
        draw(results, TASKS[flags.task], Path(plot))
    if failed:
        sys.exit(f"these failed, see above: {', '.join(failed)}")


def settings(flags: argparse.Namespace) -> dict[str, Any]:
    """What must be equal for results to be comparable."""
    given = {"train.max_steps": flags.steps} if flags.steps else {}
    return TASKS[flags.task].settings | given


def find(name: str, flags: argparse.Namespace) -> dict[str, Any] | None:
    """The result of one method: the kept one, or a new one; None if it failed."""
    made_with = settings(flags) | {"options": TASKS[flags.task].ways.get(name, {})}
    path = Path(flags.output, flags.task, f"{name}.json")
    if path.is_file():
        kept = json.loads(path.read_text("utf-8"))
        if kept["made_with"] == json.loads(json.dumps(made_with)):
            return kept
    print("running", name, "...", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, f"--run={name}", f"--task={flags.task}"]
    command += [f"--steps={flags.steps}"] if flags.steps else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return None
    result = json.loads(done.stdout.splitlines()[-1]) | {"made_with": made_with}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    return result


def train(name: str, task: Task, common: dict[str, Any]) -> dict[str, Any]:
    """Trains in one way in this process, and measures."""
    import resource

    import fjft
    from fjft.peft.methods import METHODS

    with tempfile.TemporaryDirectory() as directory:
        overrides = {
            "peft.method": name,
            "evaluate.prompt": "",
            "checkpoint.save_steps": 0,
            "checkpoint.directory": directory,
        }
        overrides |= common | task.ways.get(name, {})
        method = METHODS[overrides["peft.method"]]
        if task.new and hasattr(method.Config, "modules_to_save"):
            overrides["peft.modules_to_save"] = task.new
        config = fjft.load_config(str(ROOT / "configs" / task.config), overrides)
        result = fjft.train(config)
        log = Path(directory, "log.jsonl").read_text("utf-8")
    rows = [json.loads(line) for line in log.splitlines()]
    # The first step compiles.
    speeds = [
        row["tokens_per_second"] for row in rows if row["step"] > 1 and "loss" in row
    ]
    made_of = result.model.provenance
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "trainable": made_of.method.num_trainable(
            result.model, made_of.sites, made_of.peft_config
        ),
        "eval_loss_before": result.metrics["eval_loss_before"],
        "eval_loss": result.metrics["eval_loss"],
        "score": result.metrics[task.score],
        "losses": [(row["step"], row["loss"]) for row in rows if "loss" in row],
        "tokens_per_second": statistics.median(speeds),
        "peak_bytes": peak if sys.platform == "darwin" else peak * 1024,
    }


def describe(results: dict[str, dict[str, Any]], flags: argparse.Namespace) -> str:
    """A Markdown table, a row for each method."""
    columns = {
        "trained": lambda r: f"{r['trainable']:,}",
        "eval loss before": lambda r: f"{r['eval_loss_before']:.3f}",
        "after": lambda r: f"{r['eval_loss']:.3f}",
        "accuracy": lambda r: f"{r['score']:.1%}",
        "tokens/s": lambda r: f"{r['tokens_per_second']:.0f}",
        "peak GiB": lambda r: f"{r['peak_bytes'] / 2**30:.2f}",
    }
    common = settings(flags)
    lines = [
        f"{TASKS[flags.task].title}, {common['train.max_steps']} steps of "
        f"{common['train.batch_size']} rows",
        "",
        f"| method | {' | '.join(columns)} |",
        f"|---|{'---:|' * len(columns)}",
    ]
    for name, result in results.items():
        cells = " | ".join(say(result) for say in columns.values())
        lines.append(f"| `{name}` | {cells} |")
    return "\n".join(lines)


def draw(results: dict[str, dict[str, Any]], task: Task, path: Path) -> None:
    """Loss against trained parameters, speed against memory, and LoRA's two curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(16, 4.5))
    figure.suptitle(task.title)
    panels = (
        (left, "trainable", 1, "trained parameters", "eval_loss", "eval loss"),
        (middle, "peak_bytes", 2**30, "peak GiB", "tokens_per_second", "tokens/s"),
    )
    for axes, across, unit, across_label, up, up_label in panels:
        for name, result in results.items():
            point = result[across] / unit, result[up]
            axes.plot(*point, "o")
            axes.annotate(name, point, xytext=(5, 5), textcoords="offset points")
        axes.set_xlabel(across_label)
        axes.set_ylabel(up_label)
        axes.grid(alpha=0.3)
    left.set_xscale("log")
    before = next(iter(results.values()))["eval_loss_before"]
    left.axhline(before, linestyle=":", color="grey", label="before")
    left.legend()
    for name in ("lora", "lora, nf4"):
        if name in results:
            right.plot(*zip(*results[name]["losses"], strict=True), label=name)
    right.set_xlabel("step")
    right.set_ylabel("training loss")
    right.grid(alpha=0.3)
    right.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

"""Trains one model in every way there is, and sets the results side by side.

    python tests/compare_methods.py [--steps=40] [--only=lora,adalora]

SmolLM2-135M-Instruct learns the chat of configs/smollm2_lora_quickstart.py, the same
rows in the same order for every entry of `METHODS`. Each has a process of its own, so
that peaks of memory are its own. What one leaves is kept in `--output` as JSON and not
done again, so the command may be stopped and started; the Markdown table and the plot
are made of what is there. Speeds mean something on a quiet machine alone, and without
an accelerator JAX_PLATFORMS=cpu spares each process the search for one.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "smollm2_lora_quickstart.py"
# The peak learning rate and options of each way; a method without an entry is tried
# with its defaults. Fewer trained numbers want larger steps.
WAYS: dict[str, dict[str, Any]] = {
    "full": {"optimizer.learning_rate": 5e-5},
    "last_layers": {"peft.num_layers": 4, "optimizer.learning_rate": 3e-4},
    "lora": {"peft.r": 8, "peft.lora_alpha": 16.0},
    "adalora": {
        "peft.init_r": 12,
        "peft.target_r": 8,
        "peft.lora_alpha": 24.0,
        "peft.orth_reg_weight": 0.1,
        "optimizer.learning_rate": 3e-3,
    },
    "prompt": {"optimizer.learning_rate": 3e-2},
    "p_tuning": {"optimizer.learning_rate": 3e-3},
    "prefix": {"optimizer.learning_rate": 1e-2},
    # SmolLM2's tokens that begin and end a turn, and its end of a line.
    "trainable_tokens": {
        "peft.token_indices": (1, 2, 198),
        "optimizer.learning_rate": 3e-3,
    },
    "bottleneck": {"optimizer.learning_rate": 1e-3},
}


def main() -> None:
    """Runs what has no result yet, then writes the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=4, help="rows of a step")
    parser.add_argument("--only", help="methods, with commas; all by default")
    parser.add_argument("--output", default=str(ROOT / "runs" / "compare_methods"))
    parser.add_argument("--plot", default=str(ROOT / ".assets" / "methods.png"))
    parser.add_argument("--run", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.run:
        return print(json.dumps(train(flags.run, settings(flags))))
    from fjft.peft.methods import METHODS

    names = flags.only.split(",") if flags.only else list(METHODS)
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
        Path(flags.output, "table.md").write_text(table + "\n", "utf-8")
        draw(results, Path(flags.plot))
    if failed:
        sys.exit(f"these failed, see above: {', '.join(failed)}")


def settings(flags: argparse.Namespace) -> dict[str, int]:
    """What must be equal for results to be comparable."""
    return {"steps": flags.steps, "length": flags.length, "rows": flags.rows}


def find(name: str, flags: argparse.Namespace) -> dict[str, Any] | None:
    """The result of one method: the kept one, or a new one; None if it failed."""
    made_with = settings(flags) | {"options": WAYS.get(name, {})}
    path = Path(flags.output, f"{name}.json")
    if path.is_file():
        kept = json.loads(path.read_text("utf-8"))
        if kept["made_with"] == made_with:
            return kept
    print("running", name, "...", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, f"--run={name}"]
    command += [f"--{key}={value}" for key, value in settings(flags).items()]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return None
    result = json.loads(done.stdout.splitlines()[-1]) | {"made_with": made_with}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    return result


def train(name: str, chosen: dict[str, int]) -> dict[str, Any]:
    """Trains with one method in this process, and measures."""
    import resource

    import fjft

    with tempfile.TemporaryDirectory() as directory:
        overrides = {
            "peft.method": name,
            "data.max_length": chosen["length"],
            "train.batch_size": chosen["rows"],
            "train.max_steps": chosen["steps"],
            "evaluate.prompt": "",
            "checkpoint.save_steps": 0,
            "checkpoint.directory": directory,
        }
        result = fjft.train(
            fjft.load_config(str(CONFIG), overrides | WAYS.get(name, {}))
        )
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
        "eval_accuracy": result.metrics["eval_mean_token_accuracy"],
        "tokens_per_second": statistics.median(speeds),
        "peak_bytes": peak if sys.platform == "darwin" else peak * 1024,
    }


def describe(results: dict[str, dict[str, Any]], flags: argparse.Namespace) -> str:
    """A Markdown table, a row for each method."""
    columns = {
        "trained": lambda r: f"{r['trainable']:,}",
        "eval loss before": lambda r: f"{r['eval_loss_before']:.3f}",
        "after": lambda r: f"{r['eval_loss']:.3f}",
        "token accuracy": lambda r: f"{r['eval_accuracy']:.1%}",
        "tokens/s": lambda r: f"{r['tokens_per_second']:.0f}",
        "peak GiB": lambda r: f"{r['peak_bytes'] / 2**30:.2f}",
    }
    lines = [
        f"SmolLM2-135M-Instruct, {flags.steps} steps of {flags.rows} rows of "
        f"{flags.length} tokens, float32",
        "",
        f"| method | {' | '.join(columns)} |",
        f"|---|{'---:|' * len(columns)}",
    ]
    for name, result in results.items():
        cells = " | ".join(say(result) for say in columns.values())
        lines.append(f"| `{name}` | {cells} |")
    return "\n".join(lines)


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Eval loss against trained parameters, and speed and memory beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5))
    panels = (
        (left, "trainable", 1, "trained parameters", "eval_loss", "eval loss"),
        (right, "peak_bytes", 2**30, "peak GiB", "tokens_per_second", "tokens/s"),
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
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

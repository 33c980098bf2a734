"""`fjft evaluate`: how well a model predicts a config's held-out data."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fjft.cli import flags, weights
from fjft.errors import UserError


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = flags.make_parser(
        "evaluate",
        "Judges a model on the held-out data of a config: the loss, and the metrics of "
        "its\nobjective. By default the weights are those that the config's run left.",
        "fjft evaluate --config=configs/smollm2_lora_quickstart.py --base",
    )
    weights.add_flags(parser, with_source=False)
    parser.add_argument(
        "--output", metavar="FILE", help="also write the numbers to this JSON file"
    )
    return parser


def run(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Loads, judges, prints."""
    chosen = flags.parse(parser, argv)
    flags.join_processes()
    from fjft.distributed import is_first

    found = weights.choose(parser, chosen)
    judged = evaluate(found)
    print(found.describe())
    for name, value in judged.metrics.items():
        print(f"  {name:26} {value:.6g}")
    for report in judged.reports:
        print(report)
    if chosen.output and is_first():
        text = json.dumps({"model": found.describe()} | judged.metrics, indent=2)
        path = Path(chosen.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", "utf-8")


def evaluate(found: weights.Weights) -> Any:
    """Judges weights on the held-out data of their config.

    Returns:
      `training.evaluation.Judged`.

    Raises:
      UserError: There is no held-out data, or the model cannot be loaded.
    """
    import functools

    import jax

    from fjft import tree
    from fjft.checkpoint.source import open_model
    from fjft.training.evaluation import Evaluation
    from fjft.training.program import make_judge
    from fjft.training.step import make_eval_step
    from fjft.training.teacher import has_teacher, load_teacher, with_teacher

    e = found.experiment
    tokenizer = open_model(found.source, found.revision).load_tokenizer()
    held_out = _read_held_out(e, tokenizer)
    mesh = weights.make_mesh(found)
    with jax.set_mesh(mesh):
        model = weights.load(found, mesh)
        if has_teacher(e):
            model = with_teacher(model, load_teacher(e, mesh, tokenizer))
        graphdef, params = tree.split(model)
        step = jax.jit(make_eval_step(graphdef, make_judge(e)))
        evaluation = Evaluation(e, mesh, held_out)
        return evaluation.judge(functools.partial(step, params, {}), model, tokenizer)


def _read_held_out(experiment: Any, tokenizer: Any) -> dict[str, Any]:
    _, held_out, report = experiment.load_examples(tokenizer)
    for line in (*report.describe(), *report.warnings()):
        print(line)
    if not held_out:
        raise UserError(
            "the config holds nothing out; set data.eval to a source, or "
            "data.eval_size to a fraction or a number of examples"
        )
    return held_out

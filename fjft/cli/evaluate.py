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
    judged, report = evaluate(found)
    print(found.describe())
    for name, value in judged.items():
        print(f"  {name:26} {value:.6g}")
    if report:
        print(report)
    if chosen.output and is_first():
        text = json.dumps({"model": found.describe()} | judged, indent=2)
        path = Path(chosen.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", "utf-8")


def evaluate(found: weights.Weights) -> tuple[dict[str, float], str]:
    """Judges weights on the held-out data of their config.

    Returns:
      The metrics, and the report where there is one.

    Raises:
      UserError: There is no held-out data, or the model cannot be loaded.
    """
    import jax

    from fjft import tree
    from fjft.checkpoint.source import open_model
    from fjft.evaluate.sums import add_up
    from fjft.training.program import make_judge
    from fjft.training.run import make_eval_loader, place
    from fjft.training.step import make_eval_step

    e = found.experiment
    tokenizer = open_model(found.source, found.revision).load_tokenizer()
    held_out = _read_held_out(e, tokenizer)
    labels, metrics = held_out.examples.labels, e.metrics_module
    mesh = weights.make_mesh(found)
    with jax.set_mesh(mesh):
        model = weights.load(found, mesh)
        graphdef, params = tree.split(model)
        step = jax.jit(make_eval_step(graphdef, make_judge(e)))
        batches = make_eval_loader(e, mesh, held_out).batches()
        sums = add_up(
            lambda batch: step(params, {}, batch),
            (place(batch, mesh) for batch in batches),
            metrics.Tally(held_out.examples, e.objective),
        )
    judged = {f"eval_{k}": v for k, v in metrics.summarize(sums).items()}
    return judged, metrics.report(sums, labels.names if labels else ())


def _read_held_out(experiment: Any, tokenizer: Any) -> Any:
    _, held_out, report = experiment.load_examples(tokenizer)
    for line in (*report.describe(), *report.warnings()):
        print(line)
    if not len(held_out):
        raise UserError(
            "the config holds nothing out; set data.eval to a source, or "
            "data.eval_size to a fraction or a number of examples"
        )
    return held_out

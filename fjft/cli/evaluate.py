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
        "Judges a model on the held-out data of a config: loss in nats a token, "
        "perplexity\nand token accuracy. By default the weights are those that the "
        "config's run left.",
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
    found = weights.choose(parser, chosen)
    judged = evaluate(found)
    print(found.describe())
    for name, value in judged.items():
        print(f"  {name:26} {value:.6g}")
    if chosen.output:
        text = json.dumps({"model": found.describe()} | judged, indent=2)
        path = Path(chosen.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", "utf-8")


def evaluate(found: weights.Weights) -> dict[str, float]:
    """Judges weights on the held-out data of their config.

    Raises:
      UserError: There is no held-out data, or the model cannot be loaded.
    """
    import jax

    from fjft import tree
    from fjft.evaluate.perplexity import evaluate_sums
    from fjft.training.run import make_eval_loader, make_loss, place
    from fjft.training.step import make_eval_step

    mesh = weights.make_mesh(found)
    with jax.set_mesh(mesh):
        model = weights.load(found, mesh)
        held_out = _read_held_out(found.experiment, model)
        graphdef, params = tree.split(model)
        step = jax.jit(make_eval_step(graphdef, make_loss(found.experiment)))
        batches = make_eval_loader(found.experiment, mesh, held_out).batches()
        return evaluate_sums(
            lambda batch: step(params, {}, batch),
            (place(batch, mesh) for batch in batches),
        )


def _read_held_out(experiment: Any, model: Any) -> Any:
    from fjft.data.dataset import load_examples

    tokenizer = model.provenance.files.load_tokenizer()
    _, held_out, report = load_examples(
        experiment.data, tokenizer, experiment.train.seed
    )
    for line in (*report.describe(), *report.warnings()):
        print(line)
    if not len(held_out):
        raise UserError(
            "the config holds nothing out; set data.eval to a source, or "
            "data.eval_size to a fraction or a number of examples"
        )
    return held_out

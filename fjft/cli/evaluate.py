"""`fjft evaluate`: how well a model predicts a config's held-out data."""

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

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
    parser.add_argument(
        "--predictions",
        metavar="FILE",
        help="also write what the model makes of each example to this JSONL file: "
        "labels of texts or words, answers in texts, and with "
        "evaluate.predict_with_generate what it writes",
    )
    return parser


def run(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Loads, judges, prints."""
    chosen = flags.parse(parser, argv)
    flags.join_processes()
    from fjft.distributed import is_first

    found = weights.choose(parser, chosen)
    judged = evaluate(found, chosen.predictions)
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


def evaluate(found: weights.Weights, predictions: str | None = None) -> Any:
    """Judges weights on the held-out data of their config.

    Args:
      found: The weights.
      predictions: A file for what they make of each example; rows are not packed then,
        so its lines are in the order of the data; only what is written comes by length.

    Returns:
      `training.evaluation.Judged`.

    Raises:
      UserError: There is no held-out data, or the model cannot be loaded, or there is
        nothing that could be called a prediction.
    """
    import contextlib
    import functools

    import jax

    from fjft import tree
    from fjft.programs import keep_programs
    from fjft.training.evaluation import Evaluation
    from fjft.training.program import jit_eval_step
    from fjft.training.teacher import has_teacher, load_teacher, with_teacher

    e = found.experiment
    keep_programs(e.train.compilation_cache)
    if predictions:
        _check_predicts(e)
        unpacked = dataclasses.replace(e.data, packing=False)
        e = dataclasses.replace(e, data=unpacked)
    tokenizer = weights.load_tokenizer(found)
    held_out = _read_held_out(e, tokenizer)
    mesh = weights.make_mesh(found)
    with jax.set_mesh(mesh), contextlib.ExitStack() as closing:
        model = weights.load(found, mesh)
        for rows in held_out.values():
            rows.check_texts(model.longest_text)
        if has_teacher(e):
            model = with_teacher(model, load_teacher(e, mesh, tokenizer))
        graphdef, params = tree.split(model)
        step = jit_eval_step(e, graphdef, mesh)
        evaluation = Evaluation(e, mesh, held_out)
        make_writer = None
        if predictions:
            file = closing.enter_context(_open(predictions))
            make_writer = functools.partial(_make_writer, e, tokenizer, file)
        judge = functools.partial(step, params, {})
        return evaluation.judge(judge, model, tokenizer, make_writer)


def _check_predicts(experiment: Any) -> None:
    from fjft.evaluate.metrics import METRICS
    from fjft.objectives.objectives import OBJECTIVES

    if not (
        hasattr(experiment.metrics_module, "Predictions")
        or experiment.evaluate.predict_with_generate
    ):
        known = [
            name
            for name, module in OBJECTIVES.items()
            if hasattr(METRICS[module.METRICS], "Predictions")
        ]
        raise UserError(
            "--predictions: this objective has none of single examples; these have: "
            f"{', '.join(known)}; and where evaluate.predict_with_generate=True, what "
            "the model writes"
        )


def _open(predictions: str) -> TextIO:
    """The file, of which the first process alone writes one that stays."""
    from fjft.distributed import is_first

    path = Path(predictions if is_first() else os.devnull)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("w", encoding="utf-8")


def _make_writer(
    experiment: Any, tokenizer: Any, file: TextIO, name: str, examples: Any
) -> Any:
    import functools

    from fjft.evaluate.predictions import Writer

    decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
    reader = None
    if hasattr(experiment.metrics_module, "Predictions"):
        make_reader = experiment.metrics_module.Predictions
        reader = make_reader(examples, experiment.objective, decode)
    return Writer(file, name, examples, reader)


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

"""`fjft search`: which values of some options give the best result."""

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fjft.cli import flags
from fjft.errors import UserError

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

_LOG = ":log"


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = flags.make_parser(
        "search",
        "Trains a config again and again with other values of some options, and tells "
        "which\nwere the best by evaluate.metric_for_best_model. With "
        "evaluate.eval_steps set, trials\nthat fall behind end early. The same command "
        "goes on with a search that was stopped.",
        "fjft search --config=configs/minilm_sentiment.py --trials=20 \\\n"
        "    --space optimizer.learning_rate=1e-5..1e-3:log "
        "--space train.batch_size=16,32",
    )
    flags.add_config(parser, required=True)
    parser.add_argument(
        "--space",
        action="append",
        required=True,
        metavar="KEY=VALUES",
        help="an option and what it may be: LOW..HIGH, LOW..HIGH:log for what matters "
        "by its size, or values with commas",
    )
    parser.add_argument("--trials", type=int, default=20, help="how many in all")
    parser.add_argument("--write", metavar="FILE", help="write the best one's config")
    return parser


def run(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Searches, and shows what was found."""
    chosen = flags.parse(parser, argv)
    if importlib.util.find_spec("optuna") is None:
        raise UserError("fjft search needs Optuna: pip install 'fjft[search]'")
    config = flags.load_config(chosen)
    space = dict(parse_space(config, text) for text in chosen.space)
    from fjft.planning.tune import write_config
    from fjft.search.picture import draw
    from fjft.search.study import search

    study = search(config, space, chosen.trials, lambda line: print(line, flush=True))
    _print_table(study)
    picture = Path(config.checkpoint.directory) / "search.png"
    draw(study, picture)
    settings = " ".join(f"--config.{k}={v}" for k, v in study.best_params.items())
    print(f"best: {settings}")
    print(f"its run is trial_{study.best_trial.number}; wrote {picture}")
    if chosen.write:
        changes = chosen.overrides | study.best_params
        how = f"the best of {len(study.trials)} trials of `fjft search`"
        text = write_config(chosen.write, chosen.config, changes, how)
        Path(chosen.write).write_text(text, "utf-8")
        print(f"wrote {chosen.write}")


def parse_space(config: Any, text: str) -> "tuple[str, BaseDistribution]":
    """An option and what it may be, from `--space`.

    Raises:
      UserError: There is no such option, or its values are of another type.
    """
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    from fjft import build

    key, equals, values = text.partition("=")
    hint = build.option_type(config, key)
    if not equals or not values:
        raise UserError(f"--space {text} has no values; write KEY=LOW..HIGH or KEY=A,B")
    low, dots, high = values.removesuffix(_LOG).partition("..")
    if not dots:
        parts = values.split(",")
        choices = [flags.parse_value(key, part, hint) for part in parts]
        return key, CategoricalDistribution(choices)
    if hint not in (int, float):
        raise UserError(f"--space {text}: {key} is no number; write values with commas")
    bounds = flags.parse_value(key, low, hint), flags.parse_value(key, high, hint)
    is_log = values.endswith(_LOG)
    if bounds[0] >= bounds[1] or (is_log and bounds[0] <= 0):
        least = " and above 0" if is_log else ""
        raise UserError(f"--space {text}: LOW must be below HIGH{least}")
    kind = IntDistribution if hint is int else FloatDistribution
    return key, kind(*bounds, log=is_log)


def _print_table(study: "optuna.Study") -> None:
    from rich.console import Console
    from rich.table import Table

    options = list(study.best_params)
    table = Table("trial", *options, "result", "")
    for trial in study.trials:
        values = [
            f"{trial.params[o]:.4g}"
            if isinstance(trial.params.get(o), float)
            else str(trial.params.get(o, ""))
            for o in options
        ]
        value = "" if trial.value is None else f"{trial.value:.5g}"
        is_best = trial.number == study.best_trial.number
        state = trial.state.name.lower()
        note = "best" if is_best else "" if state == "complete" else state
        table.add_row(str(trial.number), *values, value, note)
    Console().print(table)

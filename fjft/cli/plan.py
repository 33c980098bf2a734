"""`fjft plan`: does it fit, how fast, for how much; before anything is paid for."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fjft.cli import flags


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = flags.make_parser(
        "plan",
        "Compiles a config's own train step for some hardware, which need not be there,"
        "\nand says whether it fits, what takes the memory, and how fast it is at best."
        "\nNo weights and no data are read.",
        "fjft plan --config=configs/llama31_8b_lora.py --target=v5e-8",
    )
    flags.add_config(parser, required=True)
    parser.add_argument(
        "--target",
        default="here",
        help="v5e-8, v5p-8, v6e-4, v4-8, tpu7x-8, 2xv5e-256 (two slices), ...; h100x8, "
        "a100-80gx1, a100-40gx1, l4x1, t4x1, ...; here (default) for this machine's "
        "own devices",
    )
    parser.add_argument(
        "--max-batch",
        action="store_true",
        help="search the largest train.batch_size that fits",
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="search mesh, remat, logits at a time and batch for the highest estimated "
        "speed that fits; minutes",
    )
    parser.add_argument(
        "--write", metavar="FILE", help="with --tune: write the result as a config"
    )
    parser.add_argument("--picture", metavar="FILE", help="draw the plan, as a .png")
    parser.add_argument(
        "--rows", type=int, help="rows of the training data, to tell time and price"
    )
    parser.add_argument(
        "--price", type=float, help="dollars an hour of the whole target"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Plans and prints."""
    chosen = flags.parse(parser, argv)
    if chosen.target != "here":
        # The compiler needs no device, and must not wait for one.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if chosen.write and not chosen.tune:
        parser.error("--write goes with --tune")
    from fjft.planning.picture import draw
    from fjft.planning.planner import Planner

    planner = Planner(
        flags.load_config(chosen), chosen.target, chosen.rows, chosen.price
    )
    report = _tune(chosen, planner) if chosen.tune else planner.plan()
    if chosen.max_batch:
        _ = report.max_batch
    if chosen.picture:
        draw(report).savefig(chosen.picture)
    if chosen.json:
        print(json.dumps(report.to_dict(), indent=2))
        return
    print("\n".join(report.describe()))
    if not report.fits:
        _advise(planner, report)


def _tune(chosen: argparse.Namespace, planner: Any) -> Any:
    """Searches, tells of it, and writes what was found."""
    from fjft.planning.tune import tune, write_config

    # With --json only the object goes to where it may be read by a program.
    out = sys.stderr if chosen.json else sys.stdout
    best = tune(planner, lambda line: print(line, file=out, flush=True))
    settings = " ".join(f"--config.{k}={v}" for k, v in best.changes.items())
    print(f"best: {settings}", file=out)
    print("(another batch size may want another learning rate)", file=out)
    if chosen.write:
        changes = chosen.overrides | best.changes
        how = f"as `fjft plan --tune` set it for {chosen.target}"
        text = write_config(chosen.write, chosen.config, changes, how)
        Path(chosen.write).write_text(text, "utf-8")
        print(f"wrote {chosen.write}", file=out)
    return best.report


def _advise(planner: Any, report: Any) -> None:
    from fjft.planning.tune import advise, describe_advice

    print("what would help, one change at a time:")
    for tried in advise(planner, report):
        print(f"  {describe_advice(report, tried)}", flush=True)

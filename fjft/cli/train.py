"""`fjft train`: a config in, a directory with the run out."""

import argparse
from collections.abc import Sequence

from fjft.cli import flags


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = flags.make_parser(
        "train",
        "Fine-tunes a model as a config says. The log, the loss curve, checkpoints and "
        "the\nadapter or the model go to checkpoint.directory.",
        "fjft train --config=configs/smollm2_lora_quickstart.py "
        "--config.train.max_steps=10",
    )
    flags.add_config(parser, required=True)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint, if there is one",
    )
    return parser


def run(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Trains."""
    chosen = flags.parse(parser, argv)
    flags.join_processes()
    config = flags.load_config(chosen)
    from fjft import build
    from fjft.training.loop import train

    if chosen.resume:
        build.override(config, {"checkpoint.resume": True})
    train(config)

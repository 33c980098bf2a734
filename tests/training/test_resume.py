"""Nothing is lost: killed, stopped or moved, a run's losses go on as if undisturbed.

Each interrupted run is compared with one that nobody disturbed, row by row of its
`log.jsonl`, and floats to the last digit.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_experiment import TEXT, make_config, save_tiny_model

from fjft.checkpoint.orbax import saved_steps
from fjft.errors import UserError
from fjft.peft import starts
from fjft.telemetry import read_log
from fjft.training import loop as loop_module
from fjft.training.loop import train

PROGRAM = Path(__file__).parent / "tiny_experiment.py"
# Logs and evaluations fall beside the checkpoints and beside each other, so a kill
# finds half-filled windows and evaluations between checkpoints.
TIMING = {
    "train.max_steps": 30,
    "train.log_steps": 4,
    "checkpoint.save_steps": 3,
    "evaluate.eval_steps": 7,
}


def rows_of(directory: Path) -> list[dict]:
    """The log without what depends on the clock."""
    rows = read_log(directory)
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


def configure(source: str, directory: Path, **overrides):
    timing = {name.replace(".", "__"): value for name, value in TIMING.items()}
    return make_config(source, directory, **(timing | overrides))


@pytest.fixture(scope="module")
def undisturbed(llama, tmp_path_factory) -> Path:
    """The directory of a whole run."""
    directory = tmp_path_factory.mktemp("undisturbed")
    train(configure(llama, directory))
    return directory


def test_log_of_an_undisturbed_run(undisturbed):
    """The order and number of rows, which the other tests compare with."""
    rows = rows_of(undisturbed)
    trained = [row["step"] for row in rows if "loss" in row]
    judged = [row["step"] for row in rows if "eval_loss" in row]
    assert trained == [4, 8, 12, 16, 20, 24, 28, 30]
    assert judged == [0, 7, 14, 21, 28, 30]
    # The last two; 21 is the one that was both judged and saved before the end.
    losses = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    best = min((21, 30), key=losses.__getitem__)
    assert saved_steps(undisturbed) == sorted({27, 30, best})


def run_until(
    source: str,
    directory: Path,
    is_time: Callable[[], bool],
    resume: bool,
) -> bool:
    """Runs the program and kills it with SIGKILL when it is time; False: it ended."""
    overrides = TIMING | {"checkpoint.resume": resume}
    process = subprocess.Popen(
        [sys.executable, PROGRAM, source, directory, json.dumps(overrides)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not is_time():
        time.sleep(0.001)
    was_running = process.poll() is None
    process.kill()
    _, errors = process.communicate()
    assert was_running or process.returncode == 0, errors
    return was_running


def steps_logged(directory: Path) -> int:
    log = directory / "log.jsonl"
    if not log.exists():
        return 0
    return max((row["step"] for row in read_log(log)), default=0)


def is_saving(directory: Path) -> bool:
    """Whether a checkpoint is half on disk."""
    root = directory / "checkpoints"
    return any("tmp" in path.name for path in root.glob("*"))


def finish(source: str, directory: Path) -> dict[str, float]:
    config = configure(source, directory, checkpoint__resume=True)
    return train(config).metrics


def test_killed_twice_then_resumed(llama, undisturbed, tmp_path):
    """Once somewhere between steps, once while a checkpoint is half on disk."""
    delay = random.Random(os.urandom(8)).uniform(0, 0.05)
    killed = run_until(
        llama,
        tmp_path,
        lambda: steps_logged(tmp_path) >= 8 and not time.sleep(delay),
        resume=False,
    )
    first = saved_steps(tmp_path)
    killed_again = run_until(
        llama,
        tmp_path,
        lambda: is_saving(tmp_path) and max(saved_steps(tmp_path), default=0) >= 12,
        resume=True,
    )
    second = saved_steps(tmp_path)
    print(f"killed {killed} with {first} saved, {killed_again} with {second}")
    assert first
    metrics = finish(llama, tmp_path)
    assert rows_of(tmp_path) == rows_of(undisturbed)
    assert metrics["eval_loss"] == rows_of(undisturbed)[-1]["eval_loss"]
    assert metrics["eval_loss_before"] == rows_of(undisturbed)[0]["eval_loss"]
    # The trained weights too, not only what was logged of them.
    names = "adapter/adapter_model.safetensors"
    assert (tmp_path / names).read_bytes() == (undisturbed / names).read_bytes()
    assert not is_saving(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(3))
def test_killed_again_and_again(llama, undisturbed, tmp_path, attempt):
    """Killed at random moments, until one run reaches the end by itself."""
    draw = random.Random(attempt)
    for kill in range(8):
        deadline, begun = draw.uniform(0, 1.0), []

        def is_time(begun=begun, deadline=deadline) -> bool:
            if not begun and (tmp_path / "log.jsonl").exists():
                begun.append(time.monotonic())
            return bool(begun) and time.monotonic() > begun[0] + deadline

        if not run_until(llama, tmp_path, is_time, resume=kill > 0):
            break
    finish(llama, tmp_path)
    rows = rows_of(tmp_path)
    assert rows == rows_of(undisturbed)


def interrupt_at(monkeypatch, step: int) -> None:
    """Sends this process SIGTERM while `step` is being taken."""
    original = loop_module.Loop._settle

    def settle(self, metrics, progress):
        original(self, metrics, progress)
        if progress.step == step - 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(loop_module.Loop, "_settle", settle)


def test_sigterm_saves_says_so_and_loses_nothing(
    llama, undisturbed, tmp_path, monkeypatch
):
    """At a step that would have been judged: that is made up for on resuming."""
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 14)
        with pytest.raises(UserError, match=r"stopped at step 14.*--resume"):
            train(configure(llama, tmp_path))
    assert signal.getsignal(signal.SIGTERM) is before
    assert saved_steps(tmp_path)[-1] == 14
    with pytest.raises(UserError, match=r"holds a run up to step 14.*--resume"):
        train(configure(llama, tmp_path))
    finish(llama, tmp_path)
    assert rows_of(tmp_path) == rows_of(undisturbed)
    # Once more, with nothing left to do: judged again, logged once.
    assert finish(llama, tmp_path)["eval_loss"] == rows_of(undisturbed)[-1]["eval_loss"]
    assert rows_of(tmp_path) == rows_of(undisturbed)


def test_resume_on_another_mesh(llama, undisturbed, tmp_path, monkeypatch):
    """Saved by eight devices in a row, restored on 2 x 2 x 2."""
    with monkeypatch.context() as patched:
        interrupt_at(patched, 14)
        with pytest.raises(UserError, match="stopped at step 14"):
            train(configure(llama, tmp_path, mesh__fsdp=8))
    config = configure(
        llama,
        tmp_path,
        checkpoint__resume=True,
        mesh__data=2,
        mesh__fsdp=2,
        mesh__tensor=2,
    )
    train(config)
    for found, expected in zip(rows_of(tmp_path), rows_of(undisturbed), strict=True):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            # Another order of sums: 1e-6 after 30 steps of Adam. Accuracies are counts.
            np.testing.assert_allclose(found[key], value, rtol=2e-5, err_msg=key)


def test_other_base_or_data_or_method_is_refused(llama, undisturbed, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(undisturbed, directory)
    saved = json.loads((directory / "config.json").read_text("utf-8"))
    assert saved["model"]["source"] == llama

    other = save_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(UserError) as refused:
        finish(other, directory)
    assert len(set(re.findall(r"\b[0-9a-f]{16}\b", str(refused.value)))) == 2
    assert llama in str(refused.value)
    assert other in str(refused.value)

    for overrides, message in [
        ({"train__seed": 1}, "data order"),
        ({"train__batch_size": 4}, "batch_size = 8"),
        # Not the base's values but the scale, alpha / r, of what lies beside them.
        ({"peft__r": 4}, "with the same model and options of peft"),
        ({"peft__r": 4, "peft__lora_alpha": 8.0}, "does not fit this config"),
        ({"optimizer__name": "lion"}, "does not fit this config"),
    ]:
        config = configure(llama, directory, checkpoint__resume=True, **overrides)
        with pytest.raises(UserError, match=message):
            train(config)
    # Whatever was tried, the run is as it was.
    assert rows_of(directory) == rows_of(undisturbed)
    assert saved_steps(directory) == saved_steps(undisturbed)


def test_lora_checkpoint_holds_no_base(undisturbed):
    size = sum(
        file.stat().st_size
        for file in (undisturbed / "checkpoints" / "30").rglob("*")
        if file.is_file()
    )
    trained = 3 * 8 * (4 * (64 + 64) + 3 * (64 + 96)) * 4  # bytes of float32 A and B
    # Three times that (weights and two moments), and what Orbax says of them.
    # The base has 600 kB.
    assert 1.5 * trained < size < 3 * trained + 100_000


def test_a_mixture_of_instructions_goes_on(llama, tmp_path, monkeypatch):
    words = tmp_path / "words.jsonl"
    rows = [{"word": f"word{i}", "number": i} for i in range(40)]
    words.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    options = {
        "data__train": {"talk": TEXT, "words": str(words)},
        "data__mixture_temperature": 3.0,
        "data__instructions": {
            "words/a": "Which number has {word}? ||| {number}",
            "words/b": "Say the number of {word}. ||| It is {number}.",
        },
        "data__eval_size": 0.0,
        "train__max_steps": 4,
    }
    whole = train(make_config(llama, tmp_path / "whole", **options))
    with monkeypatch.context() as patched:
        interrupt_at(patched, 2)
        with pytest.raises(UserError, match="stopped at step 2"):
            train(make_config(llama, tmp_path / "cut", **options))
    resumed = make_config(llama, tmp_path / "cut", **options, checkpoint__resume=True)
    assert train(resumed).metrics["loss"] == whole.metrics["loss"]


def test_what_an_adapter_started_from_is_resumed_too(llama, tmp_path, monkeypatch):
    """Another device would decompose the weights to other last bits, or more."""
    options = {
        "peft__init_lora_weights": "olora",
        "peft__target_modules": "v_proj",
        "train__max_steps": 3,
    }
    train(make_config(llama, tmp_path / "whole", **options))
    with monkeypatch.context() as patched:
        interrupt_at(patched, 2)
        with pytest.raises(UserError, match="stopped at step 2"):
            train(make_config(llama, tmp_path / "cut", **options))
    factors = starts.factors
    monkeypatch.setattr(
        starts, "factors", lambda *args: [1.5 * part for part in factors(*args)]
    )
    resumed = make_config(llama, tmp_path / "cut", **options, checkpoint__resume=True)
    train(resumed)
    whole, cut = (
        load_file(tmp_path / run / "adapter" / "adapter_model.safetensors")
        for run in ("whole", "cut")
    )
    for name, value in whole.items():
        np.testing.assert_array_equal(cut[name], value)

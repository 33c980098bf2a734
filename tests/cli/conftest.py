"""The real command, in this process, on tiny models and real text."""

import importlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

TRAINING_TESTS = Path(__file__).parents[1] / "training"

CONFIG = '''\
"""A tiny run."""
import json
import ml_collections


def get_config(arg=""):
    return ml_collections.ConfigDict(json.loads("""{text}"""))
'''


SHORT = {
    "train__max_steps": 2,
    "train__batch_size": 2,
    "data__max_length": 64,
    "data__eval_size": 4.0,
    "optimizer__warmup_steps": 0.0,
}


class Said(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def tiny_experiment() -> Any:
    """The module that makes tiny models and their configs."""
    sys.path.insert(0, str(TRAINING_TESTS))
    return importlib.import_module("tiny_experiment")


@pytest.fixture(scope="session")
def llama(tiny_experiment, tmp_path_factory) -> Path:
    """The directory of a tiny Llama; tests copy it before they break it."""
    directory = tmp_path_factory.mktemp("llama")
    tiny_experiment.save_tiny_model(directory)
    return directory


@pytest.fixture(scope="session")
def write_config(tiny_experiment) -> Callable[..., str]:
    """Writes a config file that trains a model in a directory for two steps."""

    def write(source: Path, directory: Path, **overrides: Any) -> str:
        config = tiny_experiment.make_config(
            str(source),
            directory / "run",
            **SHORT | overrides,
        )
        path = directory / "config.py"
        path.write_text(CONFIG.format(text=json.dumps(config.to_dict())))
        return str(path)

    return write


@pytest.fixture(scope="session")
def finished(llama, write_config, tmp_path_factory) -> Path:
    """A directory with `config.py` and its finished run; tests leave it as it is."""
    from fjft.cli.main import main

    directory = tmp_path_factory.mktemp("finished")
    path = write_config(llama, directory)
    assert main(["train", f"--config={path}", "--config.checkpoint.save_steps=1"]) == 0
    return directory


@pytest.fixture
def broken(llama, tmp_path) -> Path:
    """A copy of the tiny Llama, to be broken."""
    return Path(shutil.copytree(llama, tmp_path / "broken"))


@pytest.fixture
def call(capsys) -> Callable[[Sequence[Any]], Said]:
    """Runs the command as a shell would."""
    from fjft.cli.main import main

    def run(argv: Sequence[Any]) -> Said:
        capsys.readouterr()
        try:
            code = main([str(arg) for arg in argv])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture
def fail(call) -> Callable[[Sequence[Any]], str]:
    """Runs a command that must say one clear sentence, and returns that sentence."""

    def run(argv: Sequence[Any]) -> str:
        said = call(argv)
        assert said.code == 1, said
        assert said.err.count("\n") == 1, said.err
        assert said.err.startswith("fjft: ")
        assert "Traceback" not in said.out
        return said.err

    return run

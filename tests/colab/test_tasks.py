"""The notebook of three tasks runs, whole, as a user would run it; with fewer steps."""

import ast
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "colab" / "tasks.ipynb"


@pytest.mark.slow
def test_notebook_runs_whole(run_notebook, tmp_path):
    few = {"train.max_steps": 2, "train.batch_size": 2, "data.eval_size": 4}
    few |= {"data.max_length": 64, "data.truncation": "truncate"}
    more = {"evaluate.prompt": ""}
    parameters = f"""
for name in overrides:
    overrides[name] |= {few!r}
overrides["chat"] |= {more!r}
overrides["ner"]["evaluate.eval_steps"] = 0
runs = {str(tmp_path)!r}"""
    notebook = run_notebook(NOTEBOOK, parameters)
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 3
    answers = [
        o["data"]["text/plain"] for o in outputs if o.output_type == "execute_result"
    ]
    labels, tags, chat = map(ast.literal_eval, answers)
    assert set(labels.values()) <= {"negative", "neutral", "positive"}
    assert list(tags) == ["Apple", "opens", "a", "store", "in", "New", "York"]
    assert len(chat) == 1
    assert (tmp_path / "sentiment/adapter/adapter_model.safetensors").is_file()
    assert (tmp_path / "ner/model/model.safetensors").is_file()

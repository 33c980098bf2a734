"""Runs notebooks whole, as a user would."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest


@pytest.fixture
def run_notebook(monkeypatch) -> Callable[[Path, str], Any]:
    """Runs a notebook, with more in the cell that is tagged `parameters`."""
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES")

    def run(path: Path, parameters: str) -> Any:
        notebook = nbformat.read(path, as_version=4)
        (cell,) = [
            cell
            for cell in notebook.cells
            if "parameters" in cell.metadata.get("tags", [])
        ]
        cell.source += f"\n{parameters}"
        where = {"metadata": {"path": str(path.parent)}}
        nbclient.NotebookClient(notebook, timeout=600, resources=where).execute()
        return notebook

    return run

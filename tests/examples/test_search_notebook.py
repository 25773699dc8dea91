"""The notebook on searches runs from top to bottom, and is kept with what it showed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "search.ipynb"


def shown(notebook: Any) -> list[str]:
    """What kinds of output its cells have, in any order."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output["output_type"] == "error"]
    return sorted(kind for output in outputs for kind in output.get("data", {}))


def test_it_is_kept_with_its_outputs_and_is_small():
    kinds = shown(nbformat.read(NOTEBOOK, as_version=4))
    assert kinds.count("text/html") == 4 and kinds.count("image/png") == 1
    assert NOTEBOOK.stat().st_size < 300_000


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the kernel's machinery
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]), prepend=os.pathsep)
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    kept = shown(notebook)
    nbclient.NotebookClient(
        notebook, timeout=250, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert shown(notebook) == kept

"""Notebooks hold what the scripts beside them say, and run."""

from __future__ import annotations

from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"
SCRIPTS = sorted(FOLDER.glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_notebook_is_its_script_and_runs(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import jupytext
    import nbclient

    monkeypatch.setenv("GRAPHOPT_MEASURE", "0")
    monkeypatch.delenv("GRAPHOPT_DATA", raising=False)
    written, notebook = jupytext.read(script), jupytext.read(script.with_suffix(".ipynb"))
    cells = [[(cell.cell_type, cell.source) for cell in one.cells] for one in (written, notebook)]
    assert cells[0] == cells[1], f"jupytext --to ipynb {script.name} makes it again"
    for cell in notebook.cells:
        cell.source = cell.source.replace('".."', repr(str(FOLDER.parent)))
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert any(cell.get("outputs") for cell in notebook.cells)

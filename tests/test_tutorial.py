"""docs/tutorial.ipynb: its calls fit this version, and it runs from start to end."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tune.config.cli import FIELDS

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tutorial.ipynb"


def test_the_tutorial_gives_settings_that_exist_and_shows_pictures() -> None:
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    tree = ast.parse("\n".join(cell.source for cell in code))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    runs = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in ("run_study", "load_study")]
    names = {keyword.arg for call in runs for keyword in call.keywords}
    assert len(runs) == 3 and {"trials", "results", "resume"} <= names <= FIELDS.keys()
    outputs = [output for cell in code for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert NOTEBOOK.stat().st_size < 300_000


@pytest.mark.slow  # two studies: two minutes on two cores
@pytest.mark.ray
def test_the_tutorial_runs(tmp_path: Path, monkeypatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    notebook = nbformat.read(NOTEBOOK, 4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=500, kernel_name="python3", resources=resources).execute()
    data = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in shown for shown in data) == 3
    assert sum("<iframe" in shown.get("text/html", "") for shown in data) == 1  # the report
    texts = [shown.get("text/plain", "") for shown in data]
    assert any("Study first: COMPLETE, 3 trials" in text for text in texts) and "'COMPLETE'" in texts
    assert any("4 of 4 done" in text for text in texts)  # the progress of the study that went on
    assert (tmp_path / "tutorial" / "first" / "best_adapter" / "adapter_model.safetensors").is_file()

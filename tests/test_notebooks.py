"""The notebooks run without an error, and their cells show what their committed outputs show: text, tables, figures."""

import re
import runpy
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

EXECUTE = runpy.run_path(str(Path(__file__).parents[1] / "notebooks/execute.py"))


def kinds(notebook: NotebookNode) -> list[set[str]]:
    """The kinds of outputs of each cell. What is logged on standard error depends on the time that the cell takes."""
    cells = [cell.get("outputs", ()) for cell in notebook.cells]
    return [{kind for o in outputs for kind in o.get("data", [o.get("name")]) if kind != "stderr"} for outputs in cells]


@pytest.mark.parametrize("file", EXECUTE["NOTEBOOKS"], ids=lambda file: file.stem)
def test_notebooks_show_what_their_committed_outputs_show(file, tmp_path):
    executed, committed = EXECUTE["executed"](file, tmp_path), nbformat.read(file, as_version=4)
    assert any(kinds(committed)) and kinds(executed) == kinds(committed)
    shown = nbformat.writes(executed)
    assert all(int(share) > 50 for share in re.findall(r"(\d+)% of \d+ test questions", shown))  # a guess: 13 %

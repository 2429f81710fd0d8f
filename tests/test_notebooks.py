"""The notebooks run without an error, and their cells show what their committed outputs show: text, tables, figures."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"


def kinds(notebook: Any) -> list[set[str]]:
    """The kinds of outputs of each cell. What is logged on standard error depends on the time that the cell takes."""
    cells = [cell.get("outputs", ()) for cell in notebook.cells]
    return [{kind for o in outputs for kind in o.get("data", [o.get("name")]) if kind != "stderr"} for outputs in cells]


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.ipynb")), ids=lambda file: file.stem)
def test_notebooks_show_what_their_committed_outputs_show(file, tmp_path):
    import nbformat

    executed = runpy.run_path(str(FOLDER / "execute.py"))["executed"](file, tmp_path)
    committed = nbformat.read(file, as_version=4)
    assert any(kinds(committed)) and kinds(executed) == kinds(committed)
    shown = nbformat.writes(executed)
    assert all(int(share) > 50 for share in re.findall(r"(\d+)% of \d+ test questions", shown))  # a guess: 13 %

"""Runs notebooks and writes their outputs: `make notebooks`, or `python notebooks/execute.py NAME...` for some."""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from llava_jax.cli import COMMAND

NOTEBOOKS = sorted(Path(__file__).parent.glob("*.ipynb"))
SECONDS = 600  # of a cell


def executed(file: Path, directory: Path | str) -> NotebookNode:
    """The notebook with the outputs of a run in `directory`. Raises CellExecutionError for a cell that fails.

    Cells start the commands of this Python's environment. What libraries log about this machine (a CUDA plugin without
    a GPU, a missing ipywidgets) is left out, as the commands do.
    """
    notebook = nbformat.read(file, as_version=4)
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    settings = {"record_timing": False, "coalesce_streams": True, "resources": {"metadata": {"path": directory}}}
    client = NotebookClient(notebook, timeout=SECONDS, **settings)
    quiet = {COMMAND: "1", "PYTHONWARNINGS": "ignore:IProgress not found"}
    client.execute(env=os.environ | {"PATH": path, "JAX_PLATFORMS": "cpu"} | quiet)
    return notebook


def main() -> None:
    chosen = [file for file in NOTEBOOKS if file.stem in sys.argv[1:]] if sys.argv[1:] else NOTEBOOKS
    for file in chosen:
        with tempfile.TemporaryDirectory() as directory:
            nbformat.write(executed(file, directory), file)
        print(file)


if __name__ == "__main__":
    main()

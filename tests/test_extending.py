"""Every example of docs/extending.md runs: the Python code of a section is one program, in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path("docs/extending.md")
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def examples() -> dict[str, str]:
    """Heading of a section -> its code, all fences in their order."""
    sections = re.split(r"^## ", DOCS.read_text(), flags=re.MULTILINE)[1:]
    return {section.partition("\n")[0]: "\n".join(FENCE.findall(section)) for section in sections}


def run_python(directory: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Runs Python there, with this package, its tests' helpers and the modules in the directory."""
    path = os.pathsep.join([os.getcwd(), os.path.abspath("tests/support"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("heading", examples())
def test_example(heading, tmp_path):
    program = examples()[heading]
    assert re.search(r"^\s*assert ", program, re.MULTILINE), "an example ends with asserts that show that it works"
    (tmp_path / "example.py").write_text(program)
    done = run_python(tmp_path, "example.py")
    assert done.returncode == 0, done.stderr[-5000:]


RECIPE = """
{register}
from llava_jax.recipes import common

def get_config():
    config = common.get_config()
    config.update(stage="finetune", init="model", steps=1, batch_rows=4, max_length=128)
    config.data.update(json="data.json", images="images")
    return config
"""


def test_a_recipe_registers_what_its_model_needs(tmp_path):
    definitions = examples()["A projector"].partition("\nmodel = ")[0]
    (tmp_path / "my_projector.py").write_text(definitions)
    make = """
import my_projector, tiny
from pathlib import Path
tiny.checkpoint(Path("."), tiny.config(projector_type="mlp2x_silu"))
tiny.data(Path("."), samples=4)
"""
    done = run_python(tmp_path, "-c", make)
    assert done.returncode == 0, done.stderr[-5000:]
    (tmp_path / "without.py").write_text(RECIPE.format(register=""))
    done = run_python(tmp_path, "-m", "llava_jax.main", "--config=without.py", "--workdir=without")
    assert done.returncode == 1 and "projector_type is 'mlp2x_silu', not 'linear' or" in done.stderr
    assert "a module that registers another one has to be imported first" in done.stderr
    assert "damaged" not in done.stderr
    (tmp_path / "recipe.py").write_text(RECIPE.format(register="import my_projector"))
    done = run_python(tmp_path, "-m", "llava_jax.main", "--config=recipe.py", "--workdir=run")
    assert done.returncode == 0, done.stderr[-5000:]
    assert (tmp_path / "run" / "checkpoints" / "1").exists()

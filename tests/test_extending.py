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
    code = {section.partition("\n")[0]: "\n".join(FENCE.findall(section)) for section in sections}
    return {heading: program for heading, program in code.items() if program}


@pytest.mark.parametrize("heading", examples())
def test_example(heading, tmp_path):
    program = examples()[heading]
    assert re.search(r"^\s*assert ", program, re.MULTILINE), "an example ends with asserts that show that it works"
    (tmp_path / "example.py").write_text(program)
    path = os.pathsep.join([os.getcwd(), os.path.abspath("tests/support"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "example.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-5000:]

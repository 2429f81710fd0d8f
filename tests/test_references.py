"""Documentation, comments and scripts name only modules, functions and files that exist."""

import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("llava_jax", "docs", "configs", "launch", "benchmarks", "examples")
KINDS = ("py", "md", "sh", "yaml", "service")

NAME = re.compile(r"\bllava_jax(?!\.tar|\.json)(?:\.[A-Za-z_]\w*)+(?![\w/-]|\.py)")  # `llava_jax.data.check`
FILE = re.compile(rf"(?<![\w./$}}-])(?:{'|'.join((*FOLDERS, 'tests'))})/[\w./-]+\.(?:{'|'.join(KINDS)})\b")


def lines() -> Iterator[tuple[Path, int, str]]:
    files = [ROOT / "README.md", ROOT / "Makefile", ROOT / "launch/Dockerfile"]
    files += [file for folder in FOLDERS for kind in KINDS for file in sorted((ROOT / folder).rglob(f"*.{kind}"))]
    for file in files:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            yield file, number, line


def exists(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def test_modules_and_functions_that_are_named_exist():
    found = {name: f"{file}:{number}: {name}" for file, number, line in lines() for name in NAME.findall(line)}
    assert len(found) > 100
    assert [place for name, place in found.items() if not exists(name)] == []


def test_files_that_are_named_exist():
    found = [(file, number, path) for file, number, line in lines() for path in FILE.findall(line)]
    assert len(found) > 100
    # Code may name a file relative to its own folder.
    missing = [each for each in found if not ((ROOT / each[2]).exists() or (each[0].parent / each[2]).exists())]
    assert missing == []

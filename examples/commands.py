"""Runs the commands that users type, from a program."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from llava_jax.cli import UserError
from llava_jax.files.writing import atomic_file


class Ran(NamedTuple):
    """A command that ran to its end."""

    output: str  # its standard output
    seconds: float
    memory: int  # bytes that were resident, at the most; as Linux counts, no less than in the process that started it


def command(root: Path, module: str, *arguments: str) -> Ran:
    """Runs `python -m module arguments` and shows its messages.

    Programs that are compiled are kept under `root`, for the next command that needs them.
    """
    print(f"\n$ python -m {shlex.join([module, *arguments])}", flush=True)
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(root / "compiled")}
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True, env=environment
    )
    with process.stdout:
        output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    print(output, end="", flush=True)
    if process.returncode:
        raise UserError(f"{module} ended with status {process.returncode}; its message stands above")
    return Ran(output, round(time.monotonic() - began, 1), usage.ru_maxrss * 1024)


class Commands:
    """Runs each command once: those that ran to their end are in `root`/commands.json, and do not run again."""

    def __init__(self, root: Path):
        self.root, self._file = root, root / "commands.json"
        self._done = json.loads(self._file.read_text()) if self._file.exists() else {}

    def run(self, module: str, *arguments: str) -> Ran:
        line = shlex.join([module, *arguments])
        if line in self._done:
            print(f"\ndone before: python -m {line}", flush=True)
        else:
            self._done[line] = command(self.root, module, *arguments)
            with atomic_file(self._file) as file:
                file.write(json.dumps(self._done, indent=2).encode() + b"\n")
        return Ran(*self._done[line])

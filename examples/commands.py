"""Runs the commands that users type, from a program."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from llava_jax.cli import UserError


def command(root: Path, module: str, *arguments: str) -> str:
    """Runs `python -m module arguments`, shows its messages and returns its standard output.

    Programs that are compiled are kept under `root`, for the next command that needs them.
    """
    print(f"\n$ python -m {shlex.join([module, *arguments])}", flush=True)
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(root / "compiled")}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True, env=environment
    )
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise UserError(f"{module} ended with status {done.returncode}; its message stands above")
    return done.stdout

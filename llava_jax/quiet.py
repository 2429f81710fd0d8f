"""Drops log lines of the CUDA plugin that tell the user nothing.

The CUDA plugin of JAX logs "Could not find cuda drivers" while its shared libraries are loaded, before any log level
(TF_CPP_MIN_LOG_LEVEL) is read. The plugin may be installed only to compile for hardware you don't have, so this is no
fault. All other lines are written unchanged.
"""

import contextlib
import importlib.machinery
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from types import ModuleType
from typing import Any

_DROPPED = re.compile(rb"WARNING: All log messages before absl::InitializeLog\(\)|I\d{4} .*\bcudart_stub\.cc:")


@contextlib.contextmanager
def without_driver_lines() -> Iterator[None]:
    """Holds back what libraries write to file descriptor 2, and writes it without these lines at the end."""
    try:
        stderr = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    with tempfile.TemporaryFile() as held:
        if sys.stderr:
            sys.stderr.flush()
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            for line in held:
                if not _DROPPED.match(line):
                    os.write(2, line)


class _Finder:
    """Finds the modules of the plugin that load a shared library: when they are imported or, as JAX calls it when it
    first looks for devices, in their function `initialize`."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not re.fullmatch(r"jax_cuda\d+_plugin\.\w+|jax_plugins\.xla_cuda\d+", name):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec and spec.loader:
            create, execute = spec.loader.create_module, spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if name.startswith("jax_plugins."):
                    module.initialize = without_driver_lines()(module.initialize)

            spec.loader.create_module, spec.loader.exec_module = without_driver_lines()(create), exec_module
        return spec


def install() -> None:
    """Holds the lines back in every import of JAX from now on."""
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)

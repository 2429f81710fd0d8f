"""LLaVA (Visual Instruction Tuning, Liu et al. 2023) in JAX.

The public API: `load` a model and use it, `train` one, `preflight` a training run for hardware you don't have.
Importing this package has no side effects and imports no JAX; each name is imported when it is first used. docs/api.md
describes them all.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_jax.cli import UserError

__version__ = "0.1.0"
__all__ = ["UserError", "__version__"]

_MODULES = {"UserError": "llava_jax.cli"}  # name -> the module that defines it


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

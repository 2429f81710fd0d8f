"""LLaVA (Visual Instruction Tuning, Liu et al. 2023) in JAX.

The public API: `load` a model and use it, `train` one, `preflight` a training run for hardware you don't have.
Importing this package has no side effects and imports no JAX; each name is imported when it is first used. docs/api.md
describes them all.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_jax.api import Model, UserError, load
    from llava_jax.preflight import preflight
    from llava_jax.training.run import get_config, train

__version__ = "0.2.0"
__all__ = ["Model", "UserError", "__version__", "get_config", "load", "preflight", "train"]

# Name -> the module that defines it. `preflight` is a package that can be called.
_MODULES = {
    "Model": "llava_jax.api",
    "UserError": "llava_jax.cli",
    "get_config": "llava_jax.recipes",
    "load": "llava_jax.api",
    "train": "llava_jax.training.run",
}


def __getattr__(name: str) -> Any:
    if name == "preflight":
        return importlib.import_module("llava_jax.preflight")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

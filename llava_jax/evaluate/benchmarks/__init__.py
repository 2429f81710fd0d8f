"""The benchmarks by name. Each module here may register some, when this package is imported; read `pope.py` first.

`docs/extending.md` shows a benchmark in a module of your own.
"""

import importlib
import pkgutil

from llava_jax.evaluate.benchmark import BENCHMARKS, Benchmark

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)


def find(name: str, has: str) -> Benchmark:
    """The benchmark with this name, or `MODULE:NAME`. Raises `UserError` unless it has the attribute `has`."""
    return BENCHMARKS.import_and_find(name, lambda benchmark: getattr(benchmark, has) is not None)


def listing(has: str) -> str:
    """The benchmarks that have this attribute, for the help of a command."""
    return "\n".join(f"  {name:<16}{b.what}" for name, b in BENCHMARKS.items() if getattr(b, has) is not None)

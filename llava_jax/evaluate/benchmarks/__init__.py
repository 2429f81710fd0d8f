"""The benchmarks by name. Each module registers one or several; read `pope.py` first.

`docs/extending.md` shows a benchmark in a module of your own.
"""

from llava_jax.evaluate.benchmark import BENCHMARKS, Benchmark
from llava_jax.evaluate.benchmarks import (
    easy_vqa,
    exact,
    llava_bench,
    mm_vet,
    mmbench,
    mme,
    pope,
    scienceqa,
    scienceqa_ensemble,
    seed,
    textvqa,
    vqa,
)

__all__ = ["BENCHMARKS", "Benchmark", "find", "listing"]
MODULES = (
    easy_vqa, exact, llava_bench, mm_vet, mmbench, mme, pope, scienceqa, scienceqa_ensemble, seed, textvqa, vqa,
)  # fmt: skip


def find(name: str, has: str) -> Benchmark:
    """The benchmark with this name, or of `MODULE:OBJECT`. Raises `UserError` if it lacks the attribute `has`."""
    return BENCHMARKS.find(name, lambda benchmark: getattr(benchmark, has) is not None)


def listing(has: str) -> str:
    """The benchmarks that have this attribute, for the help of a command."""
    return "\n".join(f"  {name:<13}{b.what}" for name, b in BENCHMARKS.items() if getattr(b, has) is not None)

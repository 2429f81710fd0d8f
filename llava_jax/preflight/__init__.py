"""Compiles the training step for hardware you don't have: its memory, FLOPs, bytes, least time and predicted time.

Read `report.py` first, then `compile.py`, `predict.py`, `targets.py`, `analysis.py` and `hlo_text.py`. The package
itself can be called: `llava_jax.preflight(config, "v5e:4x4")` is the function `preflight` below, whatever was imported
before.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os

    from ml_collections import ConfigDict

    from llava_jax.preflight.report import Report


def preflight(
    config: "ConfigDict | str | os.PathLike", target: str, *, memory_fraction: float | None = None
) -> "Report":
    """Compiles the training step of a run for hardware you don't have, without weights, data or accelerator.

    ```python
    report = llava_jax.preflight("finetune:7b", "v5e:4x4")
    print(report.fits, report.to_text())
    ```

    Takes a minute or so, and the extra `preflight-tpu` or `preflight-gpu`.

    Args:
      config: see `get_config`, or the name or the file of a recipe.
      target: a slice of TPUs (`v5e:4x4`, `v5p:2x2x4`), GPUs (`h100:8`; `h100:2x8` for two hosts) or `cpu`.
      memory_fraction: the part of a GPU's memory that JAX takes; by default `XLA_PYTHON_CLIENT_MEM_FRACTION` or, as
        JAX, 0.75.

    Returns:
      A `Report`: whether the step fits, its memory, FLOPs and collectives, and the seconds that it takes, predicted and
      at least.

    Raises:
      UserError: there is no such target, a compiler is not installed, or options have a mistake.
    """
    import jax  # only now: this package is imported by `llava preflight --help`, too

    from llava_jax import cli, recipes
    from llava_jax.preflight import report, targets

    config = recipes.own_copy(config)
    if not (cli.has_accelerator() or jax.config.jax_platforms):
        jax.config.update("jax_platforms", "cpu")
    jax.devices()  # found before the environment speaks of another machine
    with targets.environment():
        return report.report(config, target, memory_fraction)


class _CallablePackage(ModuleType):
    def __call__(
        self, config: "ConfigDict | str | os.PathLike", target: str, *, memory_fraction: float | None = None
    ) -> "Report":
        return preflight(config, target, memory_fraction=memory_fraction)

    __call__.__doc__ = preflight.__doc__


sys.modules[__name__].__class__ = _CallablePackage

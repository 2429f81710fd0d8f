"""Compiled programs on disk or in a bucket, so that a restart need not compile them again."""

import os
import tempfile
import warnings

from llava_jax.cli import warn
from llava_jax.files.cache import directory, made

_TEST_BYTES = 1 << 20


def use(path: str) -> None:
    """Reads and writes compiled programs under `path`, which may be remote and shared; "" leaves JAX as it is set.

    JAX keys them by program, compiler version, flags and devices, and with several processes writes from process 0.
    What it would find there is run: nobody else may be able to write to it. Where nothing can be written there, a
    line says so, and programs are compiled as without it.
    """
    if not path:
        return
    if "://" not in path and (reason := _unwritable(path)):
        warn(f"{path}: {reason}: compiled programs are not kept for the next start")
        return
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache entry")  # one a program, if it fills
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    compilation_cache.reset_cache()  # it may have decided before that there is none
    compilation_cache.set_cache_dir(path)
    if "://" in path:
        # XLA's own cache of tuned GPU kernels lies inside by default, and knows only local directories.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def _unwritable(path: str) -> str | None:
    """Why nothing can be written to a local directory, or None."""
    try:
        if path == usual():
            made()
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(bytes(_TEST_BYTES))
    except OSError as error:
        return error.strerror or str(error)
    return None


def usual() -> str:
    """A directory for them that is the user's own; "" where JAX was given one by its environment variable."""
    return "" if os.environ.get("JAX_COMPILATION_CACHE_DIR") else str(directory() / "compiled")

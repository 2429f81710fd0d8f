"""JAX's persistent compilation cache, on disk or in a bucket: a restart doesn't compile its programs again."""

import os
import tempfile
import warnings

from llava_jax.cli import warn
from llava_jax.files.cache import directory, made

_TEST_BYTES = 1 << 20


def use(path: str) -> None:
    """Makes JAX keep compiled programs under `path`, which may be remote and shared; "" changes nothing.

    JAX keys them by program, compiler version, flags and devices; of several processes, process 0 writes. JAX runs the
    programs that it finds there, so nobody else may be able to write there. If nothing can be written, a warning says
    so and no program is kept.
    """
    if not path:
        return
    if "://" not in path and (reason := _unwritable(path)):
        warn(f"{path}: {reason}: compiled programs are not kept for the next start")
        return
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache entry")  # each program, if full
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    compilation_cache.reset_cache()  # JAX may have found before that there is no cache
    compilation_cache.set_cache_dir(path)
    if "://" in path:
        # By default XLA keeps tuned GPU kernels inside, for which it supports only local directories.
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
    """The default directory, which belongs to the user; "" if JAX's environment variable names one."""
    return "" if os.environ.get("JAX_COMPILATION_CACHE_DIR") else str(directory() / "compiled")

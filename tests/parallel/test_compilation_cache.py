"""A second process finds what the first one compiled."""

import os
import subprocess
import sys

PROGRAM = """
import sys, jax, jax.numpy as jnp
from llava_jax.parallel import compilation_cache
jax.jit(jnp.sin)(1.0)  # JAX has decided by now whether there is a cache
compilation_cache.use(sys.argv[1])
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
print(jax.jit(lambda x: jnp.cos(x).sum() * 3)(jnp.ones(8)))
print(jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_enable_xla_caches)
print("hits", hits.count("/jax/compilation_cache/cache_hits"))
"""


def run(path: str, program: str = PROGRAM) -> list[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    variables = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    done = subprocess.run(
        [sys.executable, "-c", program, path], env=inherited | variables, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_programs_are_found_again(tmp_path):
    cache = str(tmp_path / "cache")
    first, second = run(cache), run(cache)
    assert first[-1] == "hits 0" and list((tmp_path / "cache").glob("*-cache"))
    assert int(second[-1].split()[1]) >= 1 and second[0] == first[0]


def test_without_a_path_jax_stays_as_it_is():
    assert run("")[1:] == ["None xla_gpu_per_fusion_autotune_cache_dir", "hits 0"]


def test_a_remote_path_is_written_through_epath():
    """A file system in memory stands for the bucket."""
    program = (
        "import fsspec; from fsspec.implementations.memory import MemoryFileSystem\n"
        "fsspec.register_implementation('gcs', MemoryFileSystem, clobber=True)\n"
        f"{PROGRAM}"
        "print(any(name.endswith('-cache') for name in MemoryFileSystem.store))"
    )
    told = run("gs://bucket/cache", program)
    assert told[1:] == ["gs://bucket/cache none", "hits 0", "True"]

"""The flags of XLA, libtpu and their memory for each platform, all in this file.

  python -m llava_jax.xla_flags v6e      prints what a shell evaluates: export LIBTPU_INIT_ARGS=...

example, in a script (what the user has set already comes last, and so wins):
  eval "$(python -m llava_jax.xla_flags v6e)"
"""

import os
import shlex
import sys
from collections.abc import Mapping

from llava_jax import cli

TPU = {}
V6E = TPU | {"xla_tpu_scoped_vmem_limit_kib": "98304"}
GPU = {"xla_gpu_enable_latency_hiding_scheduler": "true"}

# Platform, the variable that carries its flags, the flags, other variables.
PLATFORMS = {
    **{name: ("LIBTPU_INIT_ARGS", TPU, {}) for name in ("tpu", "v4", "v5e", "v5p")},
    "v6e": ("LIBTPU_INIT_ARGS", V6E, {}),
    "gpu": ("XLA_FLAGS", GPU, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}),
    "cpu": ("XLA_FLAGS", {}, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}),
}


def compiler_options(platform: str) -> dict[str, str]:
    """The flags as `compiler_options` of `jax.stages.Lowered.compile`."""
    return dict(_platform(platform)[1])


def environment(platform: str, present: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that a process has to start with. What is `present` is kept, and wins."""
    carrier, flags, others = _platform(platform)
    words = [f"--{name}={value}" for name, value in flags.items()] + present.get(carrier, "").split()
    values = {carrier: " ".join(words)} if words else {}
    return values | {name: present.get(name, value) for name, value in others.items()}


def _platform(name: str) -> tuple[str, dict[str, str], dict[str, str]]:
    if name not in PLATFORMS:
        raise cli.UserError(f"{name!r} is no platform: give one of {', '.join(PLATFORMS)}")
    return PLATFORMS[name]


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__.strip())
        sys.exit(0 if sys.argv[1:] else 2)
    for name, value in environment(sys.argv[1]).items():
        print(f"export {name}={shlex.quote(value)}")


if __name__ == "__main__":
    cli.run(main)

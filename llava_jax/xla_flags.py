"""The flags of XLA and libtpu by platform, and the other environment variables of its processes.

usage:
  python -m llava_jax.xla_flags {tpu,v4,v5e,v5p,v6e,7x,gpu,cpu}

example, in a script (flags that are set already come last and take precedence):
  eval "$(python -m llava_jax.xla_flags v6e)"
  python -m llava_jax.main ...

A flag is set only if it changes the compiled training step: tests compile with every one of them. Peak memory of
LLaVA-1.5-7B, stage 2, 2048 tokens a row, pure FSDP, jax 0.10.2, without and with them: 8.21 and 8.21 GiB a device on
v6e:4x4 (one row a device), 17.42 and 18.18 GiB on eight H100 (four rows). Their effect on the time of a
step was not measured. These flags, which other code bases set, are left out: on v5e:4x4 and eight H100 the program is
the same with and without them:
  TPU  xla_tpu_enable_async_collective_fusion, ..._fuse_all_gather, ..._multiple_steps,
       xla_tpu_overlap_compute_collective_tc, xla_enable_async_all_gather; and, for several slices only,
       xla_tpu_enable_data_parallel_all_reduce_opt, xla_tpu_data_parallel_opt_different_sized_ops
  GPU  xla_gpu_enable_latency_hiding_scheduler, xla_gpu_enable_pipelined_reduce_scatter
"""

import os
import shlex
import sys
from collections.abc import Mapping
from typing import NamedTuple

from llava_jax import cli

TPU: dict[str, bool | int] = {}

V6E = TPU | {
    # KiB of on-chip memory that one operation may use, more than by default: larger tiles and fewer trips to HBM, which
    # v6e's faster matrix units would wait for. The value is MaxText's for dense models on v6e.
    "xla_tpu_scoped_vmem_limit_kib": 98304,
}

GPU = {
    # Gathers the weights of the next layer of a scan while a layer computes.
    "xla_gpu_enable_pipelined_all_gather": True,
    # Two layers an iteration with two buffers, so that weights that are gathered ahead need not be copied.
    "xla_gpu_enable_while_loop_double_buffering": True,
}


class Platform(NamedTuple):
    """The settings of a platform."""

    carrier: str  # the environment variable of the flags
    flags: Mapping[str, bool | int]
    variables: Mapping[str, str] = {}


PLATFORMS = {
    **dict.fromkeys(("tpu", "v4", "v5e", "v5p", "7x"), Platform("LIBTPU_INIT_ARGS", TPU)),
    "v6e": Platform("LIBTPU_INIT_ARGS", V6E),
    # JAX takes three quarters of a GPU's memory by default; NCCL, cuBLAS and cuDNN need some of the rest.
    "gpu": Platform("XLA_FLAGS", GPU, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}),
    # Large arrays in huge pages: allocations take a tenth of a step's time less.
    "cpu": Platform("XLA_FLAGS", {}, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}),
}


def compiler_options(platform: str) -> dict[str, bool | int]:
    """The flags as `compiler_options` of `jax.stages.Lowered.compile`."""
    return dict(find(platform).flags)


def environment(platform: str, present: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment variables of a process. Those that are `present` are kept and take precedence."""
    carrier, flags, variables = find(platform)
    words = [f"--{name}={str(value).lower()}" for name, value in flags.items()] + present.get(carrier, "").split()
    carried = {carrier: " ".join(words)} if words else {}
    return carried | {name: present.get(name, value) for name, value in variables.items()}


def find(platform: str) -> Platform:
    """The settings of a platform. Raises UserError for a name that is not in `PLATFORMS`."""
    if platform not in PLATFORMS:
        raise cli.UserError(f"{platform!r} is no platform: give one of {', '.join(PLATFORMS)}")
    return PLATFORMS[platform]


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"}.intersection(argv):
        cli.say(cli.as_typed(__doc__))
        return 0
    if len(argv) != 1:
        raise cli.UserError(f"give one of {', '.join(PLATFORMS)}; see --help")
    for name, value in environment(argv[0]).items():
        cli.say(f"export {name}={shlex.quote(value)}")
    return 0


if __name__ == "__main__":
    cli.run(main)

"""Every flag is known to the compiler of its platform, and does something; a wrong one would not pass.

The compilers run here without their devices, each in a process of its own, as flags are read once.
"""

import json
import os
import subprocess
import sys

import pytest

from llava_jax import xla_flags
from llava_jax.cli import UserError

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
"""
TOPOLOGIES = {
    "v6e": {"platform": "tpu", "topology_name": "v6e:2x4"},
    "gpu": {"platform": "cuda", "topology_name": "h100", "topology": "1x1x8", "target_config": H100},
}
# Without the metadata server of a TPU VM, and beside other processes that have loaded libtpu.
NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# Accumulated gradients of scanned layers whose weights are split over the devices, as in training. Prints a digest of
# the compiled program for every set of options.
PROGRAM = """
import functools, hashlib, json, re, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P

mesh = topologies.make_mesh(topologies.get_topology_desc(**json.loads(sys.argv[1])), (8,), ("fsdp",))

def layer(x_BD, w_DF):
    return jnp.tanh(x_BD @ w_DF @ w_DF.T), None

def loss(w_LDF, x_BD):
    return jnp.mean(jax.lax.scan(jax.checkpoint(layer), x_BD, w_LDF)[0] ** 2)

@jax.jit
def step(w_LDF, x_ABD):
    add = lambda total, x_BD: (total + jax.grad(loss)(w_LDF, x_BD), None)
    return w_LDF - jax.lax.scan(add, jnp.zeros_like(w_LDF), x_ABD)[0]

w_LDF = jax.ShapeDtypeStruct((4, 1024, 4096), jnp.bfloat16, sharding=NamedSharding(mesh, P(None, "fsdp")))
x_ABD = jax.ShapeDtypeStruct((2, 512, 1024), jnp.bfloat16, sharding=NamedSharding(mesh, P(None, "fsdp")))
lowered = step.lower(w_LDF, x_ABD)
for options in json.loads(sys.argv[2]):
    text = re.sub(r"metadata={[^}]*}", "", lowered.compile(compiler_options=options).as_text())
    print(hashlib.sha256(text.encode()).hexdigest())
"""


def compile_with(platform: str, options: list[dict], variables: dict[str, str] | None = None):
    """The digests of the program, compiled with each set of options in a process with these variables."""
    of_tests = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    clean = {name: value for name, value in os.environ.items() if name not in of_tests}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(TOPOLOGIES[platform]), json.dumps(options)],
        env=clean | NO_TPU | {"JAX_ENABLE_COMPILATION_CACHE": "false"} | (variables or {}),
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("platform", ["v6e", "gpu"])
def test_every_flag_is_known_and_changes_the_program(platform):
    flags = xla_flags.compiler_options(platform)
    done = compile_with(platform, [{}, flags, *({name: value} for name, value in flags.items())])
    assert done.returncode == 0, done.stderr[-2000:]
    plain, *changed = done.stdout.splitlines()
    assert len(changed) == len(flags) + 1 and plain not in changed


@pytest.mark.parametrize("platform", ["v6e", "gpu"])
def test_a_process_starts_with_the_flags_of_its_environment(platform):
    done = compile_with(platform, [{}], xla_flags.environment(platform, {}))
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("platform", TOPOLOGIES)
def test_a_wrong_flag_would_be_noticed(platform):
    wrong = compile_with(platform, [{"xla_make_it_fast": True}])
    assert wrong.returncode != 0 and "No such compile option: 'xla_make_it_fast'" in wrong.stderr
    carrier = xla_flags.find(platform).carrier
    wrong = compile_with(platform, [{}], {carrier: "--xla_make_it_fast=true"})
    assert wrong.returncode != 0 and "xla_make_it_fast" in wrong.stderr and not wrong.stdout


def test_what_is_set_already_wins():
    given = {"XLA_FLAGS": "--xla_gpu_enable_pipelined_all_gather=false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}
    values = xla_flags.environment("gpu", given)
    assert values["XLA_FLAGS"].split()[0] == "--xla_gpu_enable_pipelined_all_gather=true"
    assert values["XLA_FLAGS"].split()[-1] == given["XLA_FLAGS"]
    assert values["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
    assert xla_flags.environment("v5e", {}) == {}


@pytest.mark.parametrize("platform", xla_flags.PLATFORMS)
def test_a_shell_can_evaluate_it(platform):
    script = f'unset XLA_FLAGS LIBTPU_INIT_ARGS; eval "$("{sys.executable}" -m llava_jax.xla_flags {platform})"; env'
    inherited = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    done = subprocess.run(["bash", "-ec", script], env=inherited, capture_output=True, text=True, check=True)
    values = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert {name: values[name] for name in xla_flags.environment(platform, inherited)} == xla_flags.environment(
        platform, inherited
    )


def test_an_unknown_platform_is_refused():
    with pytest.raises(UserError, match="'abacus' is no platform: give one of tpu, v4, v5e, v5p, 7x, v6e, gpu, cpu"):
        xla_flags.find("abacus")

"""Hardware you don't have: names like `v5e:4x4` or `h100:8` become devices for ahead-of-time compilation.

`prepare_environment` must run before JAX is imported.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from llava_jax import xla_flags
from llava_jax.cli import UserError
from llava_jax.parallel.hardware import GPUS, TPUS, Gpu, Tpu

GPUS_PER_HOST = 8
EXAMPLES = (
    "v5e:4x4, v5e:1x1, v4:2x2x4, v5p:2x2x2, v6e:2x4, 7x:2x2x1, h100:8, a100:8, a100-40:1, l40s:1, rtx4090:1, l4:1, "
    "a10g:1, h200:8, b200:2x8 (2 hosts of 8), cpu"
)
ENVIRONMENT = {
    # Devices of this machine are not used.
    "JAX_PLATFORMS": "cpu",
    # Several processes may compile at once; without this, libtpu locks a file.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Outside of Google Cloud, a query for the machine's metadata hangs on some networks.
    "TPU_SKIP_MDS_QUERY": "1",
    # libtpu requires them; any valid values do, since topologies are given by name.
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A slice of TPUs, hosts of GPUs or the CPU to compile for."""

    name: str  # as given
    machine: Tpu | Gpu | None  # the properties of its devices; None for the CPU of this machine
    shape: tuple[int, ...]  # (4, 4) of a slice `4x4`, (hosts, GPUs of each), (devices,) of the CPU

    @property
    def platform(self) -> str:
        return {Tpu: "tpu", Gpu: "gpu", type(None): "cpu"}[type(self.machine)]

    @property
    def devices(self) -> int:
        return math.prod(self.shape) * (self.machine.cores if isinstance(self.machine, Tpu) else 1)

    @property
    def send_rate(self) -> float | None:
        """Bytes/s that a device can send to its neighbours, all links busy."""
        if isinstance(self.machine, Tpu):
            return sum(map(self.machine.links, self.shape)) * self.machine.link
        return self.machine.link if self.machine else None

    @property
    def larger(self) -> list[str]:
        """Names of the next larger targets of the kind."""
        if self.machine is None:
            return []
        return [name for name in family(self.machine.name) if parse(name).devices > self.devices]


def prepare_environment() -> None:
    """Sets the variables that libtpu and the CUDA plugin read when they are loaded, and lets XLA find `ptxas`."""
    os.environ.update(ENVIRONMENT)
    toolkit = cuda_toolkit()
    if toolkit:  # first on the path, since other CUDA toolkits there may have another version or be broken
        os.environ["PATH"] = f"{toolkit / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"


@contextlib.contextmanager
def environment() -> Iterator[None]:
    """A context with this environment, for a process whose JAX has initialized its devices."""
    with mock.patch.dict(os.environ):
        prepare_environment()
        yield


def cuda_toolkit() -> Path | None:
    """The folder of the wheel nvidia-cuda-nvcc that has `bin/ptxas` and libdevice."""
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations if spec else ():
        for folder in ("cuda_nvcc", "cu13"):  # of CUDA 12 and 13
            if (Path(root) / folder / "bin" / "ptxas").exists():
                return Path(root) / folder
    return None


# ------------------------------------------------------------------------------------------------------------- names


def parse(name: str) -> Target:
    """`v5e:4x4`, `h100:8`, `h100:2x8`, `cpu` -> Target; raises UserError."""
    kind, _, shape = name.partition(":")
    kind = re.sub(r"^(tpu|v)(?=7x)", "", kind)
    if kind == "cpu" and not shape:
        import jax

        return Target(name, None, (jax.device_count("cpu"),))
    if kind not in TPUS and kind not in GPUS:
        raise UserError(f"--target {name!r}: no such machine; known are {EXAMPLES}")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise UserError(f"--target {name!r}: has no size: give one, for example {family(kind)[3]}")
    sizes = tuple(map(int, shape.split("x")))
    if kind in GPUS:
        hosts, gpus = (1, *sizes) if len(sizes) == 1 else sizes if len(sizes) == 2 else (0, 0)
        if not (hosts and gpus <= GPUS_PER_HOST):
            raise UserError(f"--target {name!r}: hosts of up to {GPUS_PER_HOST} GPUs, as in {kind}:8 or {kind}:2x8")
        return Target(name, GPUS[kind], (hosts, gpus))
    if len(sizes) != TPUS[kind].axes:
        raise UserError(f"--target {name!r}: {kind} slices have {TPUS[kind].axes} axes, as in {family(kind)[-1]}")
    return Target(name, TPUS[kind], sizes)


def family(kind: str) -> list[str]:
    """Names of the usual targets of a kind, by size."""
    if kind in GPUS:
        return [f"{kind}:{size}" for size in ("1", "2", "4", "8", "2x8", "4x8", "8x8", "16x8", "32x8")]
    if kind in TPUS:
        return [f"{kind}:{size}" for size in TPUS[kind].slices]
    raise UserError(f"--target {kind!r}: no such machine; known are {', '.join((*TPUS, *GPUS))}")


# ----------------------------------------------------------------------------------------------------------- devices


def devices(target: Target) -> list:
    """Devices for a mesh. Programs can be compiled for them, but not run."""
    if isinstance(target.machine, Tpu):
        return _tpu_devices(target)
    if isinstance(target.machine, Gpu):
        return _gpu_devices(target)
    import jax

    return jax.devices("cpu")


def compile_options(target: Target) -> dict[str, Any]:
    """Options of the compiler, those that launchers set included."""
    if target.platform == "cpu":
        return {}
    if target.platform == "tpu":
        return xla_flags.compiler_options(target.machine.name)
    # Autotuning would run programs.
    offline = {"xla_gpu_autotune_level": 0, "xla_gpu_cuda_data_dir": str(cuda_toolkit())}
    return xla_flags.compiler_options("gpu") | offline


def _tpu_devices(target: Target) -> list:
    _require(target, "preflight-tpu", {"libtpu": importlib.util.find_spec("libtpu")})
    tpu = target.machine
    options: dict[str, Any] = dict(tpu.options)
    if target.shape == (1, 1):
        options["chips_per_host_bounds"] = [1, 1, 1]
    options |= {"platform": "tpu", "topology_name": f"{tpu.topology}:{'x'.join(map(str, target.shape))}"}
    return _described(target, options, "libtpu", advice=f"; {', '.join(family(tpu.name))} will do")


def _gpu_devices(target: Target) -> list:
    plugins = importlib.util.find_spec("jax_plugins")
    has_plugin = plugins and any(
        path.name.startswith("xla_cuda") for root in plugins.submodule_search_locations for path in Path(root).iterdir()
    )
    _require(target, "preflight-gpu", {"jax-cuda12-plugin": has_plugin, "nvidia-cuda-nvcc-cu12": cuda_toolkit()})
    options = {
        "platform": "cuda",
        "topology_name": target.machine.name,
        "target_config": target_config(target.machine),
        "topology": "x".join(map(str, (1, *target.shape))),
    }
    return _described(target, options, "the CUDA plugin")


def _require(target: Target, extra: str, wheels: dict[str, Any]) -> None:
    missing = [name for name, found in wheels.items() if not found]
    if missing:
        raise UserError(
            f"--target {target.name} needs {' and '.join(missing)}: pip install 'llava_jax[{extra}]' (no device needed)"
        )


def _described(target: Target, options: dict[str, Any], compiler: str, advice: str = "") -> list:
    """The devices of a topology. Raises UserError if its compiler does not know it."""
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(**options).devices)
    except Exception as error:  # jax.errors.JaxRuntimeError and others, depending on the plugin
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if "not implemented for cuda" in reason:  # JAX drops the plugin if it finds no driver while it looks for GPUs
            advice = (
                "; JAX has looked for GPUs in this process: set JAX_PLATFORMS=cpu before JAX is imported, or run "
                "python -m llava_jax.preflight"
            )
        raise UserError(f"--target {target.name}: {compiler} refuses it ({reason}){advice}") from error


def target_config(gpu: Gpu) -> str:
    """The description of a GPU for XLA's compiler, a GpuTargetConfigProto as text."""
    fields = dataclasses.asdict(gpu) | {"optin": gpu.shared_memory - 1024, "bandwidth": int(gpu.bandwidth)}
    return string.Template(Path(__file__).with_name("gpu_target.txt").read_text()).substitute(fields)


def assumed_cudnn() -> contextlib.AbstractContextManager:
    """A context in which JAX lowers to cuDNN's fused attention although no cuDNN library is installed to check.

    The library is loaded only when a program runs: the target has it.
    """
    from jax._src.cudnn import fused_attention_stablehlo

    return mock.patch.object(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


@contextlib.contextmanager
def nothing_cached() -> Iterator[None]:
    """A context without JAX's compilation cache, which cannot load programs for hardware you don't have."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX checks only once whether there is one
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()

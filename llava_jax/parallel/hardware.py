"""Memory, FLOP/s and bandwidths of accelerators. Each figure is of one JAX device and has its source.

Sources: [docs] cloud.google.com/tpu/docs, the page of each version; [book] "How to Scale Your Model",
jax-ml.github.io/scaling-book, table of TPU figures; [libtpu] the memory that the compiler reports as available; [xla]
device descriptions in openxla/xla, xla/backends/gpu/target_config/specs; [nvidia] data sheets of the products and
of DGX systems with them.
"""

import dataclasses
from collections.abc import Mapping

GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Tpu:
    """One device of a TPU slice."""

    name: str  # in the names of targets
    topology: str  # the name in libtpu
    kind: str  # `device_kind` of JAX
    memory: float  # bytes of HBM that a program can use
    flops: float  # peak bfloat16 FLOP/s
    bandwidth: float  # bytes/s of HBM
    link: float  # bytes/s of one ICI link in one direction
    axes: int  # 2 for a grid, 3 for a cube
    wraps: int  # an axis is a ring if its length is a multiple of this
    slices: tuple[str, ...]
    cores: int = 1  # devices of a chip
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)  # for libtpu, besides the topology

    def links(self, length: int) -> float:
        """Links of a device along an axis of a slice, on average over its devices.

        An axis of length d has d links in each direction if it is a ring, else d - 1; a ring of 2 has one link.
        """
        return 2.0 if length % self.wraps == 0 else 2 * (length - 1) / length


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One GPU, with the units of `Tpu`."""

    name: str
    kind: str
    memory: int  # bytes in all, of which JAX takes a fraction
    flops: float  # of dense bfloat16, without sparsity
    bandwidth: float
    link: float  # bytes/s to the other GPUs of the host, in one direction
    network: float  # bytes/s to other hosts, in one direction: the share of one GPU
    capability: int  # this and the next ones are for XLA's compiler
    cores: int
    fpus: int
    shared_memory: int
    l2_cache: int
    clock: float
    minor: int = 0  # of the capability
    threads: int = 2048  # of a core


GRID = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # [docs]
CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")  # [docs]

MEGACORE = {"chip_config_name": "megacore"}  # both cores of a chip are one device, as on a TPU VM

TPUS = {
    tpu.name: tpu
    for tpu in (
        # memory [libtpu]; FLOP/s and bandwidth [docs]; links and wraparound [book].
        Tpu("v4", "v4", "TPU v4", 30.75 * GiB, 275e12, 1228e9, 45e9, axes=3, wraps=4, slices=CUBE, options=MEGACORE),
        Tpu("v5e", "v5e", "TPU v5 lite", 15.75 * GiB, 197e12, 819e9, 45e9, axes=2, wraps=16, slices=GRID),
        Tpu("v5p", "v5p", "TPU v5", 95.74 * GiB, 459e12, 2765e9, 90e9, axes=3, wraps=4, slices=CUBE),
        Tpu("v6e", "v6e", "TPU v6 lite", 31.25 * GiB, 918e12, 1640e9, 90e9, axes=2, wraps=16, slices=GRID),
        # Two devices a chip: halves of 2307 TFLOP/s, 192 GB at 7380 GB/s, and of links of 100 GB/s each way [docs].
        Tpu("7x", "tpu7x", "TPU7x", 94.75 * GiB, 1153.5e12, 3690e9, 50e9, axes=3, wraps=4, slices=CUBE, cores=2),
    )
}

# memory, bandwidth and facts for the compiler [xla]; FLOP/s and NVLink [nvidia]; network of DGX A100, H100, H200 and
# B200: an adapter of 200, 400, 400 and 400 Gbit/s a GPU [nvidia].
_A100 = Gpu(
    "a100", "NVIDIA A100-SXM4-80GB", memory=85100068864, flops=312e12, bandwidth=2039.04e9, link=300e9, network=25e9,
    capability=8, cores=108, fpus=64, shared_memory=167936, l2_cache=41943040, clock=1.41,
)  # fmt: skip
_H100 = Gpu(
    "h100", "NVIDIA H100 80GB HBM3", memory=84942979072, flops=989.4e12, bandwidth=3352.32e9, link=450e9, network=50e9,
    capability=9, cores=132, fpus=128, shared_memory=233472, l2_cache=52428800, clock=1.98,
)  # fmt: skip
_H200 = dataclasses.replace(_H100, name="h200", kind="NVIDIA H200", memory=151397597184, bandwidth=4800e9)
_B200 = Gpu(
    "b200", "NVIDIA B200", memory=191514411008, flops=2250e12, bandwidth=7672.32e9, link=900e9, network=50e9,
    capability=10, cores=148, fpus=128, shared_memory=233472, l2_cache=132644864, clock=1.965,
)  # fmt: skip
_A100_40 = dataclasses.replace(
    _A100, name="a100-40", kind="NVIDIA A100-SXM4-40GB", memory=int(39.39 * GiB), bandwidth=1555e9
)
# GPUs on PCIe 4.0 (32 GB/s each way): memory as CUDA reports it; bandwidth and FLOP/s [nvidia]; network: the largest
# instances of AWS with eight of them, 10 Gbit/s for the GeForce.
_ADA = {"link": 32e9, "capability": 8, "minor": 9, "fpus": 128, "shared_memory": 102400, "threads": 1536}
_L4 = Gpu(
    "l4", "NVIDIA L4", memory=int(22.03 * GiB), flops=121e12, bandwidth=300e9, network=1.56e9, cores=58,
    l2_cache=48 * 2**20, clock=2.04, **_ADA,
)  # fmt: skip
_L40S = Gpu(
    "l40s", "NVIDIA L40S", memory=int(44.40 * GiB), flops=362e12, bandwidth=864e9, network=6.25e9, cores=142,
    l2_cache=96 * 2**20, clock=2.52, **_ADA,
)  # fmt: skip
_RTX4090 = Gpu(
    "rtx4090", "NVIDIA GeForce RTX 4090", memory=int(23.64 * GiB), flops=165.2e12, bandwidth=1008e9, network=1.25e9,
    cores=128, l2_cache=72 * 2**20, clock=2.52, **_ADA,
)  # fmt: skip
_A10G = Gpu(
    "a10g", "NVIDIA A10G", memory=int(22.03 * GiB), flops=70e12, bandwidth=600e9, network=1.56e9, cores=80,
    l2_cache=6 * 2**20, clock=1.71, **_ADA | {"minor": 6},
)  # fmt: skip
GPUS = {gpu.name: gpu for gpu in (_A100, _H100, _H200, _B200, _A100_40, _L40S, _RTX4090, _L4, _A10G)}


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of a JAX device; None for devices that are not in the tables, such as CPUs."""
    machines = (*TPUS.values(), *GPUS.values())
    return next((machine.flops for machine in machines if machine.kind == device_kind), None)

"""What machines reach of their data sheets, for `predict`. Each figure has its source.

Sources: [clock] peak FLOP/s over those of the matrix units in a cycle; [fitted] on the rows of docs/prediction.md that
say so; [book] "How to Scale Your Model", jax-ml.github.io/scaling-book, TPUs and GPUs; [fa3] Shah et al. 2024,
"FlashAttention-3", figures 5 and 6: cuDNN, head width 128, on an H100; [gemm] gist.github.com/Chillee,
"H100 peak matmul FLOPS"; [nccl] github.com/NVIDIA/nccl/issues/1264.
"""

from typing import NamedTuple

from llava_jax.parallel.hardware import Gpu, Tpu


class Rates(NamedTuple):
    """Shares of the data sheet unless said otherwise."""

    product: float  # of FLOP/s, by matrix products
    attention: float  # of FLOP/s, by kernels of attention
    attention_backward: float
    memory: float  # of the bandwidth
    link: float  # of the bandwidth between devices
    network: float  # and between hosts
    host: float  # bytes/s to the memory of the host
    latency: float  # seconds before a collective
    launch: float  # seconds between operations
    low: float  # the error of predictions: a step takes at least and at most so many times the predicted seconds
    high: float
    clock: float = 0.0  # Hz; 0 where the compiler estimates no cycles
    vector: float = 0.0  # of its estimate for what is no product


# Hz [clock]. Unknown for 7x.
CLOCKS = {"v4": 1.05e9, "v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}

TPU = Rates(
    product=0.91, attention=0.5, attention_backward=0.5, memory=0.85, link=0.9, network=0.9, host=10e9,
    latency=2e-6, launch=0.0, low=0.75, high=1.35, vector=0.4,
)  # fmt: skip
GPU = Rates(
    product=0.60, attention=0.55, attention_backward=0.47, memory=0.9, link=0.8, network=0.8, host=25e9,
    latency=15e-6, launch=2e-6, low=0.75, high=1.35,
)  # fmt: skip


def rates_of(machine: Tpu | Gpu) -> Rates:
    return GPU if isinstance(machine, Gpu) else TPU._replace(clock=CLOCKS.get(machine.name, 0.0))

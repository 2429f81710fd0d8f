"""What machines reach of their data sheets, for `predict`. Each figure has its source.

[clock]    The peak FLOP/s over those of the matrix units in a cycle, 2 MXUs x 2 x size^2.
[compiler] libtpu's estimates: plain products of 2048 to 11008 rows and columns take 82 to 95 % of the peak, 91 % on
           average over v4, v5e, v5p and v6e; elementwise passes take 2.5 times the time of their bytes.
[fitted]   On the rows of docs/prediction.md that say so.
[book]     "How to Scale Your Model", jax-ml.github.io/scaling-book, GPUs: an addition reaches 94 % of an H100's memory
           bandwidth.
[fa3]      Shah et al. 2024, "FlashAttention-3", figures 5 and 6: cuDNN with heads of 128 on an H100 reaches 600 to 617
           TFLOP/s forward and 465 to 518 backward at 2k to 16k tokens; a tenth less for the diagonal of causal masks.
[nccl]     github.com/NVIDIA/nccl/issues/1264: 380 of the 450 GB/s of an H100.
[assumed]  No measurement was found; it matters little in the steps of docs/prediction.md.
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
    low: float  # a step takes at least and at most so many times the predicted seconds, see docs/prediction.md
    high: float
    clock: float = 0.0  # Hz; 0 where the compiler estimates no cycles
    vector: float = 0.0  # of the compiler's estimate for what is no product


# Hz [clock]. Unknown for 7x.
CLOCKS = {"v4": 1.05e9, "v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}

TPU = Rates(
    product=0.91,  # [compiler]
    attention=0.5,  # [fitted]
    attention_backward=0.5,  # [fitted], as one rate with the forward pass
    memory=0.85,  # [assumed]
    link=0.9,  # [assumed]
    network=0.9,  # [assumed]
    host=10e9,  # [assumed]
    latency=2e-6,  # [assumed]
    launch=0.0,
    low=0.75,
    high=1.3,
    vector=0.4,  # [compiler]
)
GPU = Rates(
    product=0.6,  # [fitted]
    attention=0.55,  # [fa3]
    attention_backward=0.47,  # [fa3]
    memory=0.9,  # [book]
    link=0.84,  # [nccl]
    network=0.8,  # [assumed]
    host=25e9,  # [assumed]
    latency=15e-6,  # [assumed]
    launch=2e-6,  # [assumed]
    low=0.75,
    high=1.3,
)


# Machines of which predictions were compared with measurements, and `low` and `high` of the others.
COMPARED, ELSEWHERE = ("v5e", "v5p", "h100"), (0.6, 1.6)


def rates_of(machine: Tpu | Gpu) -> Rates:
    rates = GPU if isinstance(machine, Gpu) else TPU._replace(clock=CLOCKS.get(machine.name, 0.0))
    return rates if machine.name in COMPARED else rates._replace(low=ELSEWHERE[0], high=ELSEWHERE[1])

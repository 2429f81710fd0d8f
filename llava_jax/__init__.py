"""LLaVA (Visual Instruction Tuning, Liu et al. 2023) in JAX."""

import glob
import os
import sys

from llava_jax import quiet

# libtpu and the CUDA plugin may be installed only to compile for machines that are elsewhere. Where Linux has no
# device of theirs, JAX would look for one all the same, complain at length and take the CPU in the end.
_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia*", "/dev/dxg", "/dev/kfd")
if sys.platform == "linux" and not any(glob.glob(pattern) for pattern in _DEVICES):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
quiet.install()

# Without torch, transformers says at every start that its models are missing; only its tokenizers are used here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# What another host has just written to gs:// has to be seen: gcsfs would answer from what it listed before.
os.environ.setdefault("FSSPEC_GCS", '{"use_listings_cache": false}')

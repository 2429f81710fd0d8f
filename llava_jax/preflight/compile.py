"""Ahead-of-time compilation of the training step for a target: its memory and its HLO.

No step is run: parameters and batches are shapes.
"""

import dataclasses
import math
import os
import re
import time
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from llava_jax.checkpoint.reading import Checkpoint, open_checkpoint
from llava_jax.cli import UserError, warn_once
from llava_jax.data.plan import Layout
from llava_jax.models.config import PRESETS, LlavaConfig, quantized
from llava_jax.parallel import sharding
from llava_jax.parallel.hardware import GiB
from llava_jax.preflight import hlo_cost, hlo_text, targets
from llava_jax.preflight.targets import Target
from llava_jax.remote import is_remote
from llava_jax.training import builder, config_check
from llava_jax.training.adapters import adapted
from llava_jax.training.builder import TrainingProgram
from llava_jax.training.start import check_preset, with_images
from llava_jax.training.step import StepSettings

# Memory of a GPU that the compiler does not count: workspaces of cuBLAS and cuDNN, buffers of NCCL, the context.
GPU_MARGIN = 2 * GiB
# JAX's default of XLA_PYTHON_CLIENT_MEM_FRACTION.
MEMORY_FRACTION = 0.75
# The length of the schedule if the config has none: only constants in the program depend on it.
STEPS = 1000


@dataclasses.dataclass(frozen=True)
class Program:
    """A training step to compile for a target."""

    target: Target
    config: ConfigDict
    training: TrainingProgram

    @property
    def settings(self) -> StepSettings:
        return self.training.settings

    @property
    def mesh(self) -> Mesh:
        return self.settings.mesh

    @property
    def rows(self) -> int:
        """Rows on a device at once."""
        return self.settings.layout.batch_rows // (sharding.batch_shards(self.mesh) * self.settings.accumulation)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device."""

    parameters: float
    optimizer: float
    batch: float
    activations: float | None  # the rest at the peak: gradients, activations, gathered weights, workspace
    margin: float  # for memory that the compiler does not count
    needed: float | None  # None if the compiler failed before it was known
    available: float  # to a program

    @property
    def state(self) -> float:
        return self.parameters + self.optimizer

    @property
    def fits(self) -> bool:
        return self.needed is not None and self.needed <= self.available


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program. If the compiler ran out of memory, `module` and `cost` are None; `reason` says why in
    one line."""

    program: Program
    memory: Memory
    seconds: float
    module: hlo_text.Module | None = None
    cost: hlo_cost.Cost | None = None
    moved: float = 0.0
    reason: str = ""


# ----------------------------------------------------------------------------------------------------- the program


def build(config: ConfigDict, target: Target) -> Program:
    """The step that training runs with this configuration on the target, if every row has an image and every position
    is a target (unless the configuration sets the number of slots)."""
    config_check.check(config)
    mesh = sharding.make_mesh(config.mesh.to_dict(), targets.devices(target))
    model, stored = _model(config)
    model = adapted(with_images(model, config), config)
    layout = worst_layout(config, model)
    return Program(target, config, builder.build(config, model, layout, mesh, config.steps or STEPS, stored))


def preset(config: ConfigDict) -> str:
    """The name of the preset to compile, "" for the model of the checkpoint."""
    return config.model or ("" if config.init else config.default_model)


def _model(config: ConfigDict) -> tuple[LlavaConfig, dict[str, jax.ShapeDtypeStruct] | None]:
    """The model and, of a checkpoint, the shapes and types of its parameters."""
    name = preset(config)
    if name and name not in PRESETS:
        raise UserError(f"config.model is {name!r}, not one of {', '.join(PRESETS)}")
    if checkpoint := _checkpoint(config, required=not name):
        check_preset(config.model, checkpoint)
        checkpoint = checkpoint.quantized(config.base_dtype)
        return checkpoint.config, checkpoint.abstract()
    if name:
        return dataclasses.replace(PRESETS[name], base_dtype=quantized(config.base_dtype)), None
    raise UserError(f"neither config.model (one of {', '.join(PRESETS)}) nor config.init says which model to train")


def _checkpoint(config: ConfigDict, required: bool) -> Checkpoint | None:
    """That of `config.init`; None if it is not on this machine, as before it is made."""
    try:
        return open_checkpoint(config.init) if config.init and (required or not is_remote(config.init)) else None
    except UserError as error:
        if required:
            raise
        warn_once(f"{error}: compiles a checkpoint of {config.model} as published instead")
        return None


def worst_layout(config: ConfigDict, model: LlavaConfig) -> Layout:
    """The largest batch that a configuration allows. Slots that depend on data are one image a row (of packed rows as
    many as fit), and every position."""
    length = config_check.row_length(config)
    if model.tiling:
        slots = model.tiling.most_tiles_in(length) if config.pack else model.tiling.most_tiles
    else:
        slots = max(length // model.image_tokens, 1) if config.pack else 1
    return Layout(
        batch_rows=config.batch_rows,
        rows_per_group=config.rows_per_group,
        max_length=length,
        image_slots=max(config.image_slots or config.rows_per_group * slots, 0),
        label_slots=config.label_slots or config.rows_per_group * length,
        image_tokens=model.image_tokens,
        image_size=model.vision.image_size,
    )


# ----------------------------------------------------------------------------------------------------- compiling it


def compile_program(program: Program, memory_fraction: float | None = None) -> Compiled:
    """Compiles a program. `memory_fraction` is the share of a GPU's memory that JAX takes, see `available_memory`."""
    began = time.monotonic()
    available = available_memory(program.target, memory_fraction)
    try:
        with targets.nothing_cached(), targets.assumed_cudnn():
            lowered = program.training.lower()
            compiled = lowered.compile(compiler_options=targets.compile_options(program.target))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise UserError(f"{program.target.name}: the compiler failed: {_one_line(str(error))}") from error
        reason, needed = _out_of_memory(str(error))
        memory = _memory(program, needed, 0.0, available)
        return Compiled(program, memory, time.monotonic() - began, reason=reason)
    module = hlo_text.parse(compiled.as_text())
    cost = hlo_cost.module_cost(module)
    stats = compiled.memory_analysis()
    peak = stats.peak_memory_in_bytes
    if program.target.platform != "tpu":  # whose peak has temporary memory as one block
        total = stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.output_size_in_bytes
        peak = max(peak, total - stats.alias_size_in_bytes)
    margin = _margin(program, cost) if program.target.platform == "gpu" else 0.0
    memory = _memory(program, peak + margin, margin, available)
    reason = ""
    if not memory.fits:
        parts = f"{peak / GiB:.2f} GiB" + (f" and a margin of {margin / GiB:.2f} GiB" if margin else "")
        reason = f"the step takes {parts}, there are {available / GiB:.2f} GiB"
    moved = stats.argument_size_in_bytes + stats.output_size_in_bytes
    return Compiled(program, memory, time.monotonic() - began, module, cost, moved, reason)


def available_memory(target: Target, memory_fraction: float | None) -> float:
    """Bytes of a device that a program can use: of a GPU a fraction, by default XLA_PYTHON_CLIENT_MEM_FRACTION."""
    if target.platform == "tpu":
        return target.machine.memory
    if target.platform == "gpu":
        fraction = memory_fraction or float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY_FRACTION))
        return target.machine.memory * fraction
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / target.devices


def _margin(program: Program, cost: hlo_cost.Cost) -> float:
    """Memory of a GPU beyond the peak. The backward pass of cuDNN's attention sums gradients of queries in float32."""
    text, layout = program.settings.model.text, program.settings.layout
    fused = any(name.startswith("__cudnn$fmha") for name in cost.kernels)
    return GPU_MARGIN + fused * 4.0 * program.rows * layout.max_length * text.num_heads * text.head_dim


def _memory(program: Program, needed: float | None, margin: float, available: float) -> Memory:
    state, frozen, batch = program.training.arguments
    parameters, optimizer = local_bytes((state.trainable, frozen)), local_bytes((state.optimizer, state.ema))
    rows = local_bytes(batch)
    activations = None if needed is None else needed - margin - parameters - optimizer - rows
    return Memory(parameters, optimizer, rows, activations, margin, needed, available)


def state_bytes(program: Program) -> int:
    """Bytes of parameters and optimizer on each device: the minimum of any step."""
    return local_bytes(program.training.arguments[:2])


def local_bytes(tree: Any) -> int:
    """Bytes that a device holds of a tree of shapes with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _out_of_memory(message: str) -> tuple[str, float | None]:
    """libtpu's reason in one line, and the bytes that the program needs, if it says so."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    needs = re.search(r"[^.\n]*\(([\d.]+)([KMGT])\) exceeds available HBM[^.\n]*(?:\.\d+[^.\n]*)?", message)
    used = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm[^\n]*", message)
    found = needs or used
    if not found:
        return _one_line(message), None
    sentence = re.sub(r"^.*?(?=the total memory|total memory|Used)", "", found[0])
    return f"libtpu: {_one_line(sentence).rstrip('.')}", float(found[1]) * units[found[2]]


def _one_line(message: str) -> str:
    return next((" ".join(line.split()) for line in message.splitlines() if line.strip()), "no reason given")

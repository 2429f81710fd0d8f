"""What follows from a compiled step: the bytes it has to send, its least time, and what might make it fit."""

import math
from collections.abc import Mapping

import numpy as np

from llava_jax.models import pieces
from llava_jax.models.quantized import kept_dtype
from llava_jax.parallel import sharding
from llava_jax.preflight import hlo_cost
from llava_jax.preflight.compile import Compiled, Program
from llava_jax.training.flops import first_trained_layers

# Custom calls that compute attention: their FLOPs are not in the HLO.
ATTENTION_KERNELS = ("tpu_custom_call", "__cudnn$fmha")


def hidden_parts(cost: hlo_cost.Cost) -> tuple[str, ...]:
    """The parts of the formula whose FLOPs kernels hide in the HLO: attention, if any kernel is one."""
    fused = any(name.startswith(ATTENTION_KERNELS) for name in cost.kernels)
    return ("llm attention", "vision attention") if fused else ()


def ideal_wire(program: Program) -> float | None:
    """Bytes that a device has to send in a step with parameters sharded over `fsdp`; None if `tensor` shards them, too.

    In each microbatch, sharded weights are gathered in the type of the computation: those of layers with a backward
    pass twice, for the forward and the backward pass, others once; gradients are reduce-scattered in the same type. Of
    the embedding table only the rows of the tokens have to be sent, if they are fewer.
    """
    sizes, accumulation = sharding.axis_sizes(program.mesh), program.settings.accumulation
    n, copies = sizes["fsdp"], sizes["data"]
    if sizes["tensor"] > 1:
        return None
    state, frozen, _ = program.training.arguments
    width = program.settings.model.text.hidden_size * program.settings.dtype.itemsize
    looked_up = program.rows * program.settings.layout.max_length * width
    first = first_trained_layers(program.settings.model, state.trainable)
    total = 0.0
    for name, leaf in (state.trainable | frozen).items():
        trains, size = name in state.trainable, math.prod(leaf.shape)
        size *= kept_dtype(name, leaf.dtype, program.settings.dtype).itemsize
        if leaf.sharding.is_fully_replicated:
            total += trains * 2 * (n * copies - 1) / (n * copies) * size
            continue
        table = name.endswith("embed_tokens.embedding")
        stack = pieces.stack_of(name)
        passes = (2 if stack and pieces.rows(name, leaf)[0] >= first[stack] else 1) + trains
        total += passes * accumulation * (min(size, looked_up) if table else size) * (n - 1) / n
        total += trains * 2 * (copies - 1) / copies * size / n
    return total


def lower_bound(compiled: Compiled) -> dict[str, float]:
    """The least seconds of a step: `compute`, `memory`, `network` and the largest of them as `step`.

    This is a lower bound, not a prediction: it assumes peak rates and perfect overlap.
    """
    program, cost, machine = compiled.program, compiled.cost, compiled.program.target.machine
    kernels = sum(
        (part.needed + part.recomputed) * (0.5 if name == "llm attention" else 1.0)
        for name, part in program.training.flops.items()
        if name in hidden_parts(cost)
    )
    seconds = {"compute": (cost.flops + kernels / program.mesh.size) / machine.flops}
    # The state is read and written once; gathered weights are read in the forward and in the backward pass.
    state, frozen, _ = program.training.arguments
    weights = sum(
        math.prod(leaf.shape) * kept_dtype(name, leaf.dtype, program.settings.dtype).itemsize
        for name, leaf in (state.trainable | frozen).items()
    )
    passes = 2 * program.settings.accumulation / sharding.axis_sizes(program.mesh)["tensor"]
    seconds["memory"] = (compiled.moved + weights * passes) / machine.bandwidth
    rate = program.target.send_rate
    seconds["network"] = cost.wire / rate if rate else 0.0
    if program.target.platform == "gpu":
        host = np.array([device.id // program.target.shape[1] for device in program.mesh.devices.flat])
        crossing = sum(one.crossing(host) * one.times for one in cost.collectives)
        seconds["network"] = max(seconds["network"], crossing / machine.network)
    return seconds | {"step": max(seconds.values())}


def remedies(compiled: Compiled, candidates: Mapping[str, int]) -> list[str]:
    """Changes that might make a step fit, by arithmetic. `candidates`: larger targets and their number of devices."""
    program, memory, found = compiled.program, compiled.memory, []
    state_fits = memory.state < memory.available  # else smaller activations would not help
    if state_fits and program.rows > program.config.rows_per_group:
        fewer = max(program.rows // 2 // program.config.rows_per_group, 1) * program.config.rows_per_group
        found.append(f"--config.max_rows_per_device={fewer} (now {program.rows} rows at once)")
    if state_fits and program.config.remat == "none":
        found.append("--config.remat=full")
    if memory.needed is not None:
        rest = max(memory.needed - memory.state, 0.0)
        state, room = memory.state * program.mesh.size, 0.95 * memory.available - rest
        found += [f"--target={name}" for name, devices in candidates.items() if state / devices <= room][:1]
    return found

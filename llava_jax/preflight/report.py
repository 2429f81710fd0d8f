"""What a compiled step says of a machine that is elsewhere: memory, FLOPs and bytes beside what they should be, the
least time; and the largest batch and the smallest machine that fit."""

import dataclasses
import math
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from llava_jax.cli import say
from llava_jax.parallel import sharding
from llava_jax.preflight import hlo_cost, targets
from llava_jax.preflight.compile import Compiled, Program, available_memory, build, compile_program, preset, state_bytes
from llava_jax.training import flops

# Custom calls that are attention: their FLOPs are not in the HLO.
ATTENTION_KERNELS = ("tpu_custom_call", "__cudnn$fmha")


# ---------------------------------------------------------------------------------------------------------- one target


def report(config: ConfigDict, name: str, memory_fraction: float | None = None) -> dict[str, Any]:
    """Compiles and measures; every figure of the report, bytes, FLOPs and seconds, ready for JSON."""
    target = targets.parse(name)
    say(f"compiling for {name} ...", file=sys.stderr, flush=True)
    program = build(config, target)
    compiled = compile_program(program, memory_fraction)
    settings, memory = program.settings, compiled.memory
    parts = program.training.flops
    result = {
        "target": name,
        "fits": memory.fits,
        "devices": program.mesh.size,
        "device_kind": program.mesh.devices.flat[0].device_kind,
        "mesh": sharding.axis_sizes(program.mesh),
        "stage": config.stage,
        "model": preset(config),
        "remat": settings.remat,
        "dtype": settings.dtype.name,
        "batch_rows": settings.layout.batch_rows,
        "rows_per_device": program.rows,
        "microbatches": settings.accumulation,
        "max_length": settings.layout.max_length,
        "image_slots": settings.layout.image_slots,
        "label_slots": settings.layout.label_slots,
        "memory": dataclasses.asdict(memory),
        "flops": {
            "parts": {part: dataclasses.asdict(value) for part, value in parts.items()},
            "model": {convention: flops.model_flops(parts, convention) for convention in flops.CONVENTIONS},
        },
        "compile_seconds": compiled.seconds,
    }
    if not memory.fits:
        larger = {other: targets.parse(other).devices for other in target.larger}
        result |= {"reason": compiled.reason, "remedies": remedies(compiled, larger)}
    if compiled.cost is not None:
        result |= _measured(compiled, parts)
    return result


def _measured(compiled: Compiled, parts: dict[str, flops.Part]) -> dict[str, Any]:
    """What the compiled text says: FLOPs beside the formula, collectives, and the bound of the time."""
    program, account = compiled.program, compiled.cost
    hidden = hidden_parts(account)
    expected = flops.executed_flops(parts, without=hidden) / program.mesh.size
    ideal = ideal_wire(program)
    measured = {
        "compiled": {
            "flops": account.flops,
            "formula": expected,
            "ratio": account.flops / expected,
            "recomputed": account.recomputed_flops,
            "recomputed_at": account.recomputed_at(),
            "kernels": account.kernels,
            "left_out": list(hidden),
            "loops_of_unknown_length": list(account.unknown_loops),
        },
        "collectives": {
            "kinds": account.by_kind(),
            "wire": account.wire,
            "ideal": ideal,
            "ratio": account.wire / ideal if ideal else None,
        },
    }
    machine = program.target.machine
    if machine is None:
        return measured
    seconds = lower_bound(compiled)
    tokens = program.settings.layout.batch_rows * program.settings.layout.max_length
    peaks = {"flops": machine.flops, "memory": machine.bandwidth, "network": program.target.send_rate}
    if program.target.platform == "gpu":
        peaks["between_hosts"] = machine.network
    return measured | {
        "bound": {
            "seconds": seconds,
            "peaks": peaks,
            "tokens_per_second_per_device": tokens / seconds["step"] / program.mesh.size,
            "mfu": flops.mfu(parts, seconds["step"], program.mesh.size, machine.flops),
        }
    }


# ------------------------------------------------------------------------------------------------------------- searches


def largest_batch(config: ConfigDict, name: str, memory_fraction: float | None = None) -> dict[str, Any]:
    """The report of the most rows at once on a device that fit, `batch_rows` being rounded up to a multiple of all
    devices'; of the least where none do."""
    tried: dict[int, dict[str, Any]] = {}

    def fits(groups: int) -> bool:
        tried[groups] = report(with_rows(config, name, groups * config.rows_per_group), name, memory_fraction)
        return tried[groups]["fits"]

    good, bad = 0, 1
    while fits(bad):
        good, bad = bad, bad * 2
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    rows = {groups * config.rows_per_group: result["fits"] for groups, result in sorted(tried.items())}
    return tried[good or 1] | {"search": "batch", "tried": rows}


def smallest_slice(config: ConfigDict, kind: str, memory_fraction: float | None = None) -> dict[str, Any]:
    """The report of the least machine of a kind that fits, or of the largest where none does. Rows on a device at
    once are as the configuration says, `batch_rows` being rounded up to a multiple."""
    rows = max(config.max_rows_per_device, config.rows_per_group)
    tried: dict[str, bool] = {}
    names = targets.family(kind.partition(":")[0])
    for name in names:
        changed, target = with_rows(config, name, rows), targets.parse(name)
        state = state_bytes(build(changed, target))
        tried[name] = state < available_memory(target, memory_fraction)  # else there is no need to compile
        if tried[name] or name == names[-1]:
            result = report(changed, name, memory_fraction)
            tried[name] = result["fits"]
        if tried[name]:
            break
    return result | {"search": "slice", "tried": tried}


def with_rows(config: ConfigDict, name: str, rows: int) -> ConfigDict:
    """The configuration with so many rows on a device at once and, if need be, more rows in a step."""
    shards = sharding.batch_shards(sharding.make_mesh(config.mesh.to_dict(), targets.devices(targets.parse(name))))
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
        changed.max_rows_per_device = rows
        changed.batch_rows = math.ceil(config.batch_rows / (rows * shards)) * rows * shards
    return changed


# ---------------------------------------------------------------------------------------------- what follows from it


def hidden_parts(account: hlo_cost.Cost) -> tuple[str, ...]:
    """The parts of the formula that the HLO hides in kernels: attention, where any kernel is one."""
    fused = any(name.startswith(ATTENTION_KERNELS) for name in account.kernels)
    return ("llm attention", "vision attention") if fused else ()


def ideal_wire(program: Program) -> float | None:
    """Bytes that a device has to send in a step with parameters split over `fsdp`; None where `tensor` splits, too.

    In each microbatch, what is split travels in the type of computation: the weights of the decoder's layers for the
    forward and for the backward pass, others, which are kept or have no backward pass, once; and so do gradients. Of
    the table of word embeddings only the rows that the tokens name have to travel, if they are less.
    """
    sizes, accumulation = sharding.axis_sizes(program.mesh), program.settings.accumulation
    n, copies = sizes["fsdp"], sizes["data"]
    if sizes["tensor"] > 1:
        return None
    state, frozen, _ = program.training.arguments
    looked_up = program.rows * program.settings.layout.max_length * program.settings.model.text.hidden_size
    total = 0.0
    for name, leaf in (state.trainable | frozen).items():
        trains, size = name in state.trainable, math.prod(leaf.shape)
        if leaf.sharding.is_fully_replicated:
            total += trains * 2 * (n * copies - 1) / (n * copies) * size
            continue
        table = name.endswith("embed_tokens.embedding")
        passes = (2 if name.startswith("llm.layers.") else 1) + trains
        total += passes * accumulation * (min(size, looked_up) if table else size) * (n - 1) / n
        total += trains * 2 * (copies - 1) / copies * size / n
    return total * program.settings.dtype.itemsize


def lower_bound(compiled: Compiled) -> dict[str, float]:
    """Seconds that a step takes at least: `compute`, `memory`, `network` and, of these, the most as `step`.

    What a machine cannot do at its peak is not in it, nor what cannot overlap: a bound, not a prediction.
    """
    program, account, machine = compiled.program, compiled.cost, compiled.program.target.machine
    kernels = sum(
        (part.needed + part.recomputed) * (0.5 if name == "llm attention" else 1.0)
        for name, part in program.training.flops.items()
        if name in hidden_parts(account)
    )
    seconds = {"compute": (account.flops + kernels / program.mesh.size) / machine.flops}
    # State is read and written once, and whole weights are read in the forward and in the backward pass.
    state, frozen, _ = program.training.arguments
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves((state.trainable, frozen)))
    passes = 2 * program.settings.accumulation / sharding.axis_sizes(program.mesh)["tensor"]
    read = weights * program.settings.dtype.itemsize * passes
    seconds["memory"] = (compiled.moved + read) / machine.bandwidth
    rate = program.target.send_rate
    seconds["network"] = account.wire / rate if rate else 0.0
    if program.target.platform == "gpu":
        host = np.array([device.id // program.target.shape[1] for device in program.mesh.devices.flat])
        crossing = sum(one.crossing(host) * one.times for one in account.collectives)
        seconds["network"] = max(seconds["network"], crossing / machine.network)
    return seconds | {"step": max(seconds.values())}


def remedies(compiled: Compiled, candidates: Mapping[str, int]) -> list[str]:
    """What might make a step fit, by arithmetic. `candidates`: larger machines and their devices."""
    program, memory, found = compiled.program, compiled.memory, []
    state_fits = memory.state < memory.available  # else smaller activations would not help
    if state_fits and program.rows > program.config.rows_per_group:
        fewer = max(program.rows // 2 // program.config.rows_per_group, 1) * program.config.rows_per_group
        found.append(f"--config.max_rows_per_device={fewer} (now {program.rows} rows at once)")
    if state_fits and program.config.remat == "none":
        found.append("--config.remat=full")
    if memory.needed is not None:
        rest = max(memory.needed - memory.state, 0.0)
        for name, devices in candidates.items():
            if memory.state * program.mesh.size / devices + rest <= 0.95 * memory.available:
                found.append(f"--target={name}")
                break
    return found

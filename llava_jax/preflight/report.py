"""The preflight report of a configuration on a target: memory, FLOPs and bytes, least and predicted time of a step."""

import dataclasses
import math
import sys
from typing import Any

from ml_collections import ConfigDict

from llava_jax.cli import say
from llava_jax.parallel import sharding
from llava_jax.parallel.hardware import Tpu
from llava_jax.preflight import predict, text
from llava_jax.preflight.analysis import hidden_parts, ideal_wire, lower_bound, remedies
from llava_jax.preflight.compile import Compiled, Memory, Program, build, compile_program, preset
from llava_jax.preflight.targets import parse
from llava_jax.training import flops


@dataclasses.dataclass(frozen=True)
class CompiledFlops:
    """Matrix FLOPs of a device in a step as compiled, compared with the formula."""

    flops: float
    formula: float  # of what the HLO shows, see `left_out`
    ratio: float  # of both
    recomputed: float  # what the compiler recomputes to save memory, in addition to `remat`
    recomputed_at: dict[str, float]  # its largest parts, by place in the program
    kernels: dict[str, int]  # runs by name; the HLO does not show their FLOPs
    left_out: list[str]  # the parts of the formula that they compute
    loops_of_unknown_length: list[str]  # counted once


@dataclasses.dataclass(frozen=True)
class Collectives:
    """Bytes of a device in a step."""

    kinds: list[dict[str, Any]]  # kind, dtype, count, payload, wire
    wire: float  # bytes sent
    ideal: float | None  # what parameters sharded over fsdp need; None if they are sharded over tensor, too
    ratio: float | None  # of both; None without collectives


@dataclasses.dataclass(frozen=True)
class Bound:
    """The least time of a step, at peak rates."""

    seconds: dict[str, float]  # compute, memory, network and their maximum, step
    peaks: dict[str, float | None]  # FLOP/s and bytes/s of a device
    tokens_per_second_per_device: float
    mfu: dict[str, float]  # by convention of counting attention


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The time of a step, predicted from the schedule of the compiled program (`predict`)."""

    seconds: float
    low: float  # a range in which published steps lay, see docs/prediction.md
    high: float
    mfu: dict[str, float]  # by convention of counting attention
    tokens_per_second_per_device: float
    exposed_communication: float  # seconds, of `seconds`
    parts: dict[str, dict[str, float]]  # part of the model -> seconds of compute, memory and communication
    longest: list[dict[str, Any]]  # the ten longest operations: name, part, kind, seconds each time, times


@dataclasses.dataclass(frozen=True)
class Report:
    """Preflight of a configuration on a target. Bytes are those of each device."""

    target: str
    fits: bool
    devices: int
    device_kind: str
    mesh: dict[str, int]  # devices by axis
    stage: str
    model: str  # the preset; "" for the model of the checkpoint
    remat: str
    dtype: str
    batch_rows: int
    rows_per_device: int  # at once
    microbatches: int
    max_length: int
    image_slots: int  # of a group
    label_slots: int
    memory: Memory
    flops: dict[str, flops.Part]  # of a step over all devices, by formula and part of the model
    compile_seconds: float
    reason: str = ""  # why it doesn't fit
    remedies: tuple[str, ...] = ()  # what might make it fit
    compiled: CompiledFlops | None = None  # None if the compiler ran out of memory
    collectives: Collectives | None = None
    bound: Bound | None = None  # None for the CPU
    prediction: Prediction | None = None  # None for the CPU
    search: str = ""  # "batch", "slice" or "fastest"
    # Rows or targets -> whether they fit; of "fastest", overrides -> predicted seconds, None if they don't fit.
    tried: dict[Any, Any] = dataclasses.field(default_factory=dict)
    overrides: tuple[str, ...] = ()  # of the fastest configuration
    cost: dict[str, float] | None = None  # see `epoch_cost`

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints, for `json.dumps`. What does not apply is left out."""
        values = dataclasses.asdict(self)
        values["flops"] = {
            "parts": values["flops"],
            "model": {convention: flops.model_flops(self.flops, convention) for convention in flops.CONVENTIONS},
        }
        optional = {field.name for field in dataclasses.fields(self) if field.default is not dataclasses.MISSING}
        optional = (optional | {"tried"}) - (set() if self.fits else {"remedies"})
        return {name: value for name, value in values.items() if value or name not in optional}

    def epoch_cost(self, price: float, samples: int) -> dict[str, float]:
        """Hours and money of an epoch, at a price of a chip for an hour, if every row is one sample."""
        machine = parse(self.target).machine
        chips = self.devices / (machine.cores if isinstance(machine, Tpu) else 1)
        steps = math.ceil(samples / self.batch_rows)
        hours = steps * self.prediction.seconds / 3600
        return {"samples": samples, "steps": steps, "hours": hours, "money": hours * chips * price}

    def to_text(self) -> str:
        """The report in lines of text."""
        return text.text(self)


def report(config: ConfigDict, target: str, memory_fraction: float | None = None) -> Report:
    """Compiles the training step for a target, such as "v5e:4x4", and measures it.

    Raises UserError for a mistake in the configuration or the target, and if the compiler is missing or fails.
    """
    parsed = parse(target)
    say(f"compiling for {target} ...", file=sys.stderr, flush=True)
    program = build(config, parsed)
    compiled = compile_program(program, memory_fraction)
    settings, layout, fits = program.settings, program.settings.layout, compiled.memory.fits
    larger = {} if fits else {other: parse(other).devices for other in parsed.larger}
    return Report(
        target=target,
        fits=fits,
        devices=program.mesh.size,
        device_kind=program.mesh.devices.flat[0].device_kind,
        mesh=sharding.axis_sizes(program.mesh),
        stage=config.stage,
        model=preset(config),
        remat=settings.remat,
        dtype=settings.dtype.name,
        batch_rows=layout.batch_rows,
        rows_per_device=program.rows,
        microbatches=settings.accumulation,
        max_length=layout.max_length,
        image_slots=layout.image_slots,
        label_slots=layout.label_slots,
        memory=compiled.memory,
        flops=program.training.flops,
        compile_seconds=compiled.seconds,
        reason="" if fits else compiled.reason,
        remedies=() if fits else tuple(remedies(compiled, larger)),
        **({} if compiled.cost is None else _measured(compiled)),
    )


def _measured(compiled: Compiled) -> dict[str, CompiledFlops | Collectives | Bound | Prediction | None]:
    """What the compiled text shows."""
    program, cost = compiled.program, compiled.cost
    hidden = hidden_parts(cost)
    formula = flops.executed_flops(program.training.flops, without=hidden) / program.mesh.size
    ideal = ideal_wire(program)
    return {
        "compiled": CompiledFlops(
            flops=cost.flops,
            formula=formula,
            ratio=cost.flops / formula,
            recomputed=cost.recomputed_flops,
            recomputed_at=cost.recomputed_at(),
            kernels=cost.kernels,
            left_out=list(hidden),
            loops_of_unknown_length=list(cost.unknown_loops),
        ),
        "collectives": Collectives(cost.by_kind(), cost.wire, ideal, cost.wire / ideal if ideal else None),
        "bound": _bound(compiled) if program.target.machine else None,
        "prediction": _prediction(compiled) if program.target.machine else None,
    }


def _bound(compiled: Compiled) -> Bound:
    program, machine = compiled.program, compiled.program.target.machine
    seconds = lower_bound(compiled)
    peaks = {"flops": machine.flops, "memory": machine.bandwidth, "network": program.target.send_rate}
    if program.target.platform == "gpu":
        peaks["between_hosts"] = machine.network
    return Bound(seconds=seconds, peaks=peaks, **_speed(program, seconds["step"]))


def _prediction(compiled: Compiled) -> Prediction:
    program = compiled.program
    hardware = predict.hardware_of(program.target, program.mesh)
    found = predict.summary(predict.operations(compiled.module, hardware))
    low, high = (found["seconds"] * share for share in (hardware.rates.low, hardware.rates.high))
    return Prediction(low=low, high=high, **found, **_speed(program, found["seconds"]))


def _speed(program: Program, seconds: float) -> dict[str, Any]:
    """Rates of a step that takes so many seconds."""
    layout, devices = program.settings.layout, program.mesh.size
    return {
        "tokens_per_second_per_device": layout.batch_rows * layout.max_length / seconds / devices,
        "mfu": flops.mfu(program.training.flops, seconds, devices, program.target.machine.flops),
    }

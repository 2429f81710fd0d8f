"""How long a compiled step will take, predicted from its schedule.

A device runs the instructions of a computation in the order of the text. Each takes as long as the slowest of its
parts, at what machines reach of their data sheets (`rates`):

- Products: on TPUs the cycles that the compiler estimates (`estimated_cycles`), elsewhere their FLOPs.
- Memory: the bytes read and written, those in on-chip memory aside. The compiler's cycles of operations that only move
  data are about 2.5 times too long for their bytes.
- Kernels of attention: their FLOPs, from the shapes of their operands.
- Collectives: the bytes that are sent, over the links along which their group extends.

Asynchronous collectives and copies go on from their start, one after the other, until their end waits for them. That
wait, and synchronous collectives, are exposed communication. A loop takes as long as its iterations.

docs/prediction.md compares predictions with published measurements.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from llava_jax.parallel.hardware import Gpu, Tpu
from llava_jax.preflight import hlo_cost, hlo_loops, hlo_text
from llava_jax.preflight.hlo_cost import Collective
from llava_jax.preflight.hlo_text import Computation, Instruction, Module, Shape
from llava_jax.preflight.rates import Rates, rates_of
from llava_jax.preflight.targets import Target

# Instructions that take no time.
FREE = frozenset(
    (
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "iota"),
        *("optimization-barrier", "partition-id", "replica-id", "domain", "add-dependency"),
    )
)
# Copies that go on while others compute.
COPIES = ("copy", "slice", "dynamic-slice", "dynamic-update-slice")
# Named scopes of the model in the order in which they decide -> the part of the model.
SCOPES = {
    "vision": "vision",
    "projector": "projector",
    "loss": "logits",
    "logits": "logits",
    "attention": "attention",
    "qkv": "qkv",
    "mlp": "mlp",
    "llama_layers": "layers, the rest",
}
REST = "optimizer and the rest"
SPLASH = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)")
COMPUTE, MEMORY, COMMUNICATION = KINDS = ("compute", "memory", "communication")


@dataclasses.dataclass(frozen=True)
class Operation:
    """An instruction, or the wait for one."""

    name: str
    part: str  # of the model
    kind: str  # of `KINDS`: what it spends its time with
    seconds: float  # each time
    times: int = 1

    @property
    def total(self) -> float:
        return self.seconds * self.times


class Hardware(NamedTuple):
    """The devices that run a program, and what they reach."""

    machine: Tpu | Gpu
    rates: Rates
    shape: tuple[int, ...]  # of the slice; of GPUs, hosts and GPUs of each
    positions: Sequence[tuple[int, ...]]  # of each device of the program in this shape

    def product(self, flops: float, cycles: float) -> float:
        """Seconds of matrix products. Estimated cycles beyond those of plain products are for memory that is read and
        written on the side, and too long as all for memory are."""
        seconds = flops / (self.machine.flops * self.rates.product)
        if not cycles or not self.rates.clock:
            return seconds
        estimated = cycles / self.rates.clock
        return max(min(estimated, seconds), self.rates.vector * estimated)

    def memory(self, size: float, cycles: float = 0.0) -> float:
        """Seconds in which bytes are read and written, and vectors computed."""
        vectors = cycles / self.rates.clock * self.rates.vector if self.rates.clock else 0.0
        return max(size / (self.machine.bandwidth * self.rates.memory), vectors)

    def collective(self, one: Collective) -> float:
        """Seconds of one collective. A group has the links along the axes of the slice along which it extends."""
        if isinstance(self.machine, Gpu):
            host = [position[0] for position in self.positions]
            inside = one.wire / (self.machine.link * self.rates.link)
            return self.rates.latency + max(inside, one.crossing(host) / (self.machine.network * self.rates.network))
        axes = [] if one.kind == "collective-permute" else self.axes(one)  # which is between neighbors
        links = max(sum(self.machine.links(self.shape[axis]) for axis in axes), 1.0)
        return self.rates.latency + one.wire / (links * self.machine.link * self.rates.link)

    def links(self, one: Collective, instruction: Instruction) -> list[str]:
        """The links that a collective takes: those along axes of the slice, of a permutation in one direction."""
        if isinstance(self.machine, Gpu):
            return ["network"]
        steps = hlo_text.numbers(instruction.find(r"source_target_pairs={{(\d+,\d+)}"))
        if steps:
            source, target = (self.positions[device] for device in steps)
            moves = [(b - a, length) for a, b, length in zip(source, target, self.shape, strict=True)]
            # The shorter way around a ring.
            return [f"{axis} {move % length <= length // 2}" for axis, (move, length) in enumerate(moves) if move]
        return [f"{axis} {forward}" for axis in self.axes(one) for forward in (True, False)]

    def axes(self, one: Collective) -> list[int]:
        """The axes of the slice along which the group of a collective extends."""
        positions = zip(*(self.positions[device] for device in one.group), strict=True)
        return [axis for axis, along in enumerate(positions) if len(set(along)) > 1]


def hardware_of(target: Target, mesh: Mesh) -> Hardware:
    """The devices of a mesh on a target."""
    if target.platform == "gpu":
        positions = [divmod(device.id, target.shape[1]) for device in mesh.devices.flat]
    else:
        positions = [device.coords[: len(target.shape)] for device in mesh.devices.flat]
    return Hardware(target.machine, rates_of(target.machine), target.shape, positions)


def operations(module: Module, hardware: Hardware) -> list[Operation]:
    """What a device does in one run of a program, in order. Its times add up to that of the program."""
    return _Schedule(module, hardware).computation(module.computations[module.entry], [])


def summary(found: Sequence[Operation]) -> dict[str, Any]:
    """Seconds: of all, of `exposed_communication`, of `parts` of the model by kind, and ten `longest` operations."""
    parts: dict[str, dict[str, float]] = {}
    for one in found:
        of = parts.setdefault(one.part, dict.fromkeys(KINDS, 0.0))
        of[one.kind] += one.total
    by_time = dict(sorted(parts.items(), key=lambda item: -sum(item[1].values())))
    longest = sorted(found, key=lambda one: -one.total)[:10]
    return {
        "seconds": sum(one.total for one in found),
        "exposed_communication": sum(one.total for one in found if one.kind == COMMUNICATION),
        "parts": by_time,
        "longest": [dataclasses.asdict(one) for one in longest],
    }


# ---------------------------------------------------------------------------------------------------------- the walk


class _Schedule:
    """Walks the computations of a module."""

    def __init__(self, module: Module, hardware: Hardware):
        self.module, self.hardware, self.costs = module, hardware, hlo_cost.Costs(module)

    def computation(self, computation: Computation, arguments: list) -> list[Operation]:
        """`arguments`: the known values of the computation's parameters, see `hlo_loops`."""
        now, found = 0.0, []
        free: dict[str, float] = collections.defaultdict(float)  # resource -> when it is free
        ends: dict[str, float] = {}  # of what goes on

        def add(new: Sequence[Operation]) -> None:
            nonlocal now
            found.extend(one for one in new if one.total)
            now += sum(one.total for one in new)

        for one in computation.instructions.values():
            going = max((ends[operand] for operand in one.operands if operand in ends), default=None)
            if one.opcode == "while":
                add(self.loop(computation, one, arguments))
            elif one.opcode in ("call", "conditional"):
                add(self.called(computation, one, arguments))
            elif self.ends(one):
                kind = COMMUNICATION if self.collectives(computation, one.operands) else MEMORY
                add([Operation(one.name, part(self.module, one), kind, max((going or 0.0) - now, 0.0))])
            elif started := self.start(computation, one):
                resources, seconds = started
                ends[one.name] = max(now, *(free[resource] for resource in resources)) + seconds
                free |= dict.fromkeys(resources, ends[one.name])
            else:
                if one.opcode not in FREE:
                    add([self.operation(computation, one)])
                if going is not None:
                    ends[one.name] = going
        return found

    def loop(self, computation: Computation, one: Instruction, arguments: list) -> list[Operation]:
        body, known, trips = hlo_loops.unrolled(self.module, computation, one, arguments)
        times = 1 if trips is None else trips
        return [dataclasses.replace(each, times=each.times * times) for each in self.computation(body, known)]

    def called(self, computation: Computation, one: Instruction, arguments: list) -> list[Operation]:
        """Of a conditional, the longest branch."""
        values = [hlo_loops.value(self.module, computation, name, arguments) for name in one.operands]
        values = [] if one.opcode == "conditional" else values
        branches = [self.computation(self.module.computations[name], values) for name in one.callees]
        return max(branches, key=lambda found: sum(each.total for each in found))

    # -------------------------------------------------------------------------------------- what goes on in parallel

    def ends(self, one: Instruction) -> bool:
        """Whether it waits for the end of something asynchronous."""
        if one.opcode.endswith("-done"):
            return True
        return one.opcode == "fusion" and self.calls_custom(one, "AsyncCollectiveDone")

    def start(self, computation: Computation, one: Instruction) -> tuple[list[str], float] | None:
        """The resources that something asynchronous takes from here on, and for how many seconds."""
        if one.opcode.endswith("-start") or (one.opcode == "fusion" and self.calls_custom(one, "AsyncCollectiveStart")):
            sent = self.cost(computation, one).collectives
            if one.opcode.removesuffix("-start") in COPIES:
                size, spaces = one.shapes[1].bytes, {shape.space for shape in one.shapes[:2]}
                if hlo_text.HOST in spaces:
                    return ["host"], size / self.hardware.rates.host
                return ["memory"], self.hardware.memory(size * (1 if hlo_text.ON_CHIP in spaces else 2))
            if sent:
                links = [link for each in sent for link in self.hardware.links(each, one)]
                return links, sum(self.hardware.collective(each) * each.times for each in sent)
            if one.opcode == "async-start":
                return ["other"], sum(each.total for each in self.called(computation, one, []))
        return None

    def collectives(self, computation: Computation, operands: Sequence[str]) -> bool:
        """Whether one of these is a collective, or a part of one."""
        while operands:
            one = computation.instructions[operands[0]]
            if one.opcode not in ("get-tuple-element", "bitcast", "tuple"):
                return not one.opcode.startswith(COPIES)
            operands = one.operands
        return False

    def calls_custom(self, one: Instruction, target: str) -> bool:
        fused = self.module.called(one, "calls")
        return any(inner.target == target for inner in fused.instructions.values() if inner.opcode == "custom-call")

    def cost(self, computation: Computation, one: Instruction) -> hlo_cost.Cost:
        return self.costs.instruction(computation, one, [], False, set())

    # ------------------------------------------------------------------------------------------------ one after another

    def operation(self, computation: Computation, one: Instruction) -> Operation:
        """An instruction that takes the device for itself."""
        cost = self.cost(computation, one)
        seconds = dict.fromkeys(KINDS, 0.0)
        cycles = float(one.find(r'"estimated_cycles":"(\d+)"') or 0)
        size = self.traffic(computation, one)
        if cost.flops:
            seconds[COMPUTE], seconds[MEMORY] = self.hardware.product(cost.flops, cycles), self.hardware.memory(size)
        elif attention := attention_flops(computation, one):
            backward = re.search("_dq|_dkv|Backward", one.name + one.target)
            rate = self.hardware.rates.attention_backward if backward else self.hardware.rates.attention
            seconds[COMPUTE] = attention / (self.hardware.machine.flops * rate)
            seconds[MEMORY] = self.hardware.memory(size)
        elif cost.collectives:
            seconds[COMMUNICATION] = sum(self.hardware.collective(each) * each.times for each in cost.collectives)
        else:
            seconds[MEMORY] = self.hardware.memory(size, cycles)
        kind = max(KINDS, key=seconds.get)
        launch = self.hardware.rates.launch if one.opcode not in FREE else 0.0
        return Operation(one.name, part(self.module, one), kind, seconds[kind] + launch)

    def traffic(self, computation: Computation, one: Instruction) -> float:
        """Bytes of memory off the chip that an instruction reads and writes."""
        if one.opcode == "custom-call" and one.target.startswith(hlo_cost.BOOKKEEPING):
            return 0.0
        shapes = [computation.instructions[name].shapes for name in one.operands]
        if one.opcode == "fusion":
            fused = self.module.called(one, "calls")
            return sum(_reads(fused, number, of) for number, of in enumerate(shapes)) + _writes(self.module, fused, one)
        if one.opcode == "dynamic-update-slice":
            return 2 * _size(shapes[1])
        if one.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * _size(one.shapes)
        return sum(map(_size, shapes)) + _size(one.shapes)


def part(module: Module, one: Instruction) -> str:
    """The part of the model that an instruction belongs to. Kernels of TPUs, which hide it, are of the decoder."""
    names = [one.op_name or ("attention" if SPLASH.match(one.name) else "")]
    if not names[0] and one.opcode == "fusion":
        names = [inner.op_name for inner in module.called(one, "calls").instructions.values()]
    scopes = set(re.findall(r"\w+", " ".join(names)))
    return next((name for scope, name in SCOPES.items() if scope in scopes), REST)


def _size(shapes: Sequence[Shape]) -> float:
    return sum(shape.bytes for shape in shapes if shape.space == 0)


def _reads(fused: Computation, number: int, shapes: Sequence[Shape]) -> float:
    """Bytes that a fusion reads of one operand: of slices, what is sliced; of what is updated in place, nothing."""
    parameter = next(
        one.name for one in fused.instructions.values() if one.opcode == "parameter" and one.literal == str(number)
    )
    read, names = 0.0, [parameter]
    while names:
        name = names.pop()
        for user in fused.users[name]:
            if user.opcode in ("bitcast", "reshape"):
                names.append(user.name)
            elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                read += sum(shape.bytes for shape in user.shapes) if _size(shapes) else 0.0
            elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == name):
                return _size(shapes)
    return min(read, _size(shapes))


def _writes(module: Module, fused: Computation, one: Instruction) -> float:
    """Bytes that a fusion writes: of what is updated in place, the update."""
    root = fused.instructions[fused.root]
    results = [fused.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(results) != len(one.shapes):
        return _size(one.shapes)
    written = 0.0
    for result, shape in zip(results, one.shapes, strict=True):
        while result.opcode in ("bitcast", "reshape"):
            result = fused.instructions[result.operands[0]]
        if result.opcode == "dynamic-update-slice" and shape.space == 0:
            written += fused.instructions[result.operands[1]].shapes[0].bytes
        else:
            written += _size([shape])
    return written


# ----------------------------------------------------------------------------------------------------------- attention


def attention_flops(computation: Computation, one: Instruction) -> float:
    """FLOPs of a kernel that computes attention, by the shapes of its operands; 0 of others.

    Splash attention (TPU) computes the blocks that are not masked out. cuDNN counts half of the scores of causal masks.
    A pass has two products of queries and keys, the gradients five or, in two kernels, three and four.
    """
    if one.opcode != "custom-call":
        return 0.0
    if one.target.startswith("__cudnn$fmha"):
        scores = math.prod(hlo_text.numbers(one.find(r'"dimensions": ?\[([^\]]*)\]').replace('"', "")))
        products = 5 if one.target.endswith("Backward") else 2
        share = 0.5 if "CAUSAL" in one.find(r'"mask_type": ?"([^"]*)"') else 1.0
        return products * 2.0 * scores * one.shapes[0].dims[-1] * share
    kernel = SPLASH.match(one.name)
    if not kernel:
        return 0.0
    shapes = [computation.instructions[name].shapes[0] for name in one.operands]
    query, key = [shape.dims for shape in shapes if shape.dtype in ("bf16", "f32") and len(shape.dims) >= 3][:2]
    masks = [shape.dims for shape in shapes if shape.dtype == "s8" and len(shape.dims) == 3]
    share = _causal_share(*masks[0][1:]) if masks else 1.0
    products = {"fwd": 2, "dq": 3, "dkv": 4}[kernel[1]]
    if kernel[1] == "dkv" and len(one.shapes) > len([shape for shape in one.shapes if shape.dtype == "f32"]) + 2:
        products = 5  # with the gradient of the queries
    return products * 2.0 * math.prod(query) * key[-2] * share


def _causal_share(queries: int, keys: int) -> float:
    """The share of blocks that causal attention computes, of a grid of blocks of queries and keys."""
    return sum(math.ceil((row + 1) * keys / queries) for row in range(queries)) / (queries * keys)

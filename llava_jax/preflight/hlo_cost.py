"""What a compiled step costs, from its HLO text: FLOPs of matrix products and bytes of collectives, loops included.

XLA's own `cost_analysis` counts the body of a loop once and leaves out collectives. Here costs add up over the graph of
`hlo_text`:

- Matrix products are `dot`s, cuBLAS calls or, on TPU, `convolution`s with windows that partly lie in the padding: only
  pairs inside count, as in XLA's HloCostAnalysis.
- On TPU, an asynchronous collective appears in the fusion that starts it, in those that it overlaps with and in the one
  that ends it. Channel ids do not tell collectives apart, since `jax.shard_map` gives one id to many.
- An all-reduce of which a fusion keeps a slice is a reduce-scatter. Outside of fusions, TPU writes even
  `psum_scatter` as an all-reduce, which counts as an all-reduce.
- Kernels (Pallas, cuDNN) hide their FLOPs: they are listed by name and have to be added by formula.

`python -m llava_jax.hlo FILE` prints the cost of a saved text.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from llava_jax.parallel.hardware import GiB
from llava_jax.preflight import hlo_loops, hlo_text
from llava_jax.preflight.hlo_text import TRANSPARENT, Computation, Instruction, Module, Shape

# The window of a convolution: its fields and their values along axes of which nothing is said.
WINDOW = {"stride": "1", "pad": "0_0", "lhs_dilate": "1", "rhs_dilate": "1"}
# Custom calls that compute nothing.
BOOKKEEPING = ("AllocateBuffer", "AsyncCollective", "ConcatBitcast", "Sharding", "SPMD")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction."""

    kind: str  # one of `hlo_text.COLLECTIVES`, synchronous or not
    dtype: str  # of the payload, as HLO writes it ("bf16")
    payload: float  # bytes of the array on one device: the result of an all-gather, the operand of the others
    group: tuple[int, ...]  # the devices (partition numbers) of the first group that exchanges data
    times: int  # how often a step runs it, loops unrolled

    @property
    def wire(self) -> float:
        """Bytes that a device sends each time, around a ring."""
        n = len(self.group)
        shares = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0, "collective-broadcast": 1.0}
        return self.payload * shares.get(self.kind, (n - 1) / n)

    def crossing(self, host: Sequence[int]) -> float:
        """Bytes that a device sends to other hosts each time, at least, if the devices of a host share the work.
        `host[d]` is the host of device d."""
        hosts = len({host[device] for device in self.group})
        if self.kind == "collective-permute":
            return self.payload * (hosts > 1)
        if self.kind == "all-to-all":
            return self.payload * (hosts - 1) / hosts
        return self.payload * (hosts - 1) / len(self.group) * (2 if self.kind == "all-reduce" else 1)


@dataclasses.dataclass(frozen=True)
class Matmul:
    """One matrix product."""

    flops: float  # each time, 2 a multiply-add
    dtype: str
    times: int
    op_name: str  # its operation in JAX
    recomputed: bool  # whether the compiler added it, to save memory


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one device does in one run of a part of a compiled program. Costs add up."""

    matmuls: tuple[Matmul, ...] = ()
    collectives: tuple[Collective, ...] = ()
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)  # runs of each custom call; FLOPs are unknown
    unknown_loops: tuple[str, ...] = ()  # whose number of iterations depends on data; they count as one

    @classmethod
    def sum(cls, costs: Iterable["Cost"]) -> "Cost":
        costs = list(costs)
        kernels: collections.Counter[str] = collections.Counter()
        for cost in costs:
            kernels.update(cost.kernels)
        return cls(
            tuple(matmul for cost in costs for matmul in cost.matmuls),
            tuple(collective for cost in costs for collective in cost.collectives),
            dict(kernels),
            tuple(loop for cost in costs for loop in cost.unknown_loops),
        )

    def __mul__(self, times: int) -> "Cost":
        return Cost(
            tuple(dataclasses.replace(matmul, times=matmul.times * times) for matmul in self.matmuls),
            tuple(dataclasses.replace(one, times=one.times * times) for one in self.collectives),
            {name: count * times for name, count in self.kernels.items()},
            self.unknown_loops,
        )

    @property
    def flops(self) -> float:
        return sum(matmul.flops * matmul.times for matmul in self.matmuls)

    @property
    def recomputed_flops(self) -> float:
        """The part of `flops` that the compiler added to save memory, as far as its names show it."""
        return sum(matmul.flops * matmul.times for matmul in self.matmuls if matmul.recomputed)

    def recomputed_at(self) -> dict[str, float]:
        """The places in the JAX program with the most of these FLOPs."""
        places: collections.Counter[str] = collections.Counter()
        for matmul in self.matmuls:
            if matmul.recomputed:
                places[matmul.op_name] += matmul.flops * matmul.times
        return dict(places.most_common(3))

    @property
    def wire(self) -> float:
        return sum(collective.wire * collective.times for collective in self.collectives)

    def by_kind(self) -> list[dict[str, Any]]:
        """A row for each kind and dtype: `kind, dtype, count, payload, wire` (bytes of a step), most wire first."""
        rows: dict[tuple[str, str], dict[str, Any]] = {}
        for one in self.collectives:
            empty = {"kind": one.kind, "dtype": one.dtype, "count": 0, "payload": 0.0, "wire": 0.0}
            row = rows.setdefault((one.kind, one.dtype), empty)
            row["count"] += one.times
            row["payload"] += one.payload * one.times
            row["wire"] += one.wire * one.times
        return sorted(rows.values(), key=lambda row: -row["wire"])


def cost(text: str) -> Cost:
    """The cost of a program, from the text of `compiled.as_text()`."""
    return module_cost(hlo_text.parse(text))


def module_cost(module: Module) -> Cost:
    return Costs(module).computation(module.computations[module.entry], [])


# ---------------------------------------------------------------------------------------------- costs of the graph


class Costs:
    """The costs of a module's computations and instructions. `again`: whether the compiler added them."""

    def __init__(self, module: Module):
        self.module = module
        self.started = {
            _chain_key(one)
            for computation in module.computations.values()
            for one in computation.instructions.values()
            if one.collective and _is_start(computation, one)
        }

    def computation(self, computation: Computation, arguments: list, again: bool = False) -> Cost:
        """`arguments`: the known values of the computation's parameters, see `hlo_loops`."""
        orphans: set = set()  # asynchronous collectives whose start is not in the module
        return Cost.sum(
            self.instruction(computation, one, arguments, again or ".remat" in one.name, orphans)
            for one in computation.instructions.values()
        )

    def instruction(
        self, computation: Computation, one: Instruction, arguments: list, again: bool, orphans: set
    ) -> Cost:
        match one.opcode:
            case "while":
                return self.loop(computation, one, arguments, again)
            case "fusion":
                return self.fusion(self.module.called(one, "calls"), again, orphans)
            case "call" | "async-start":
                callee = self.module.computations[one.callees[0]]
                values = [hlo_loops.value(self.module, computation, name, arguments) for name in one.operands]
                return self.computation(callee, values, again)
            case "conditional":  # the branch with the most FLOPs, then bytes
                branches = [self.computation(self.module.computations[name], [], again) for name in one.callees]
                return max(branches, key=lambda cost: (cost.flops, cost.wire))
            case _:
                return self.leaf(computation, one, again)

    def loop(self, computation: Computation, one: Instruction, arguments: list, again: bool) -> Cost:
        body, known, trips = hlo_loops.unrolled(self.module, computation, one, arguments)
        iteration = self.computation(body, known, again)
        return Cost.sum([Cost(unknown_loops=(one.name,)), iteration]) if trips is None else iteration * trips

    def fusion(self, fused: Computation, again: bool, orphans: set) -> Cost:
        costs = []
        for one in fused.instructions.values():
            if one.opcode == "fusion":
                costs.append(self.fusion(self.module.called(one, "calls"), again, orphans))
            elif one.collective and _is_chained(fused, one) and not _is_start(fused, one):
                key = _chain_key(one)
                if key not in self.started and key not in orphans:
                    orphans.add(key)
                    costs.append(self.leaf(fused, one, again))
            else:
                costs.append(self.leaf(fused, one, again, fused=True))
        return Cost.sum(costs)

    def leaf(self, computation: Computation, one: Instruction, again: bool, fused: bool = False) -> Cost:
        """An instruction that calls no computation."""
        if one.collective:
            sliced = fused and one.collective == "all-reduce" and _keeps_a_slice(computation, one)
            return self.collective(computation, one, "reduce-scatter" if sliced else one.collective)
        if one.opcode in ("dot", "convolution") or one.is_gemm:
            lhs, rhs = (computation.instructions[operand].shapes[0] for operand in one.operands[:2])
            flops = _convolution_flops(one, lhs, rhs) if one.opcode == "convolution" else _dot_flops(one, lhs)
            return Cost(matmuls=(Matmul(flops, lhs.dtype, 1, one.op_name, again),))
        if one.opcode == "custom-call" and not one.target.startswith(BOOKKEEPING):
            return Cost(kernels={one.target: 1})
        return Cost()

    def collective(self, computation: Computation, one: Instruction, kind: str) -> Cost:
        """A collective of several arrays is one of each dtype."""
        group = hlo_text.device_group(one, self.module.partitions)
        if len(group) < 2:
            return Cost()
        payloads: dict[str, float] = collections.defaultdict(float)
        for operand in one.operands:
            for shape in computation.instructions[operand].shapes:
                payloads[shape.dtype] += shape.bytes * (len(group) if kind == "all-gather" else 1)
        return Cost(collectives=tuple(Collective(kind, *payload, group, 1) for payload in payloads.items()))


def _is_chained(fused: Computation, one: Instruction) -> bool:
    """Whether a collective in a fusion is part of an asynchronous one, on TPU."""
    return (
        'chain_id="' in one.attributes
        or fused.name.startswith("async_collective_fusion")
        or any(other.target.startswith("AsyncCollective") for other in fused.users[one.name])
    )


def _is_start(fused: Computation, one: Instruction) -> bool:
    return any(other.target == "AsyncCollectiveStart" for other in fused.users[one.name])


def _chain_key(one: Instruction) -> tuple:
    shapes = tuple(shape._replace(space=0) for shape in one.shapes)
    return one.find(r'chain_id="(\d+)"'), one.find(r"channel_id=(\d+)"), one.opcode, shapes, one.op_name


def _keeps_a_slice(fused: Computation, one: Instruction) -> bool:
    """Whether a result is used only through a slice of it."""
    users = fused.users[one.name]
    return bool(users) and all(
        user.opcode == "dynamic-slice" or (user.opcode in TRANSPARENT and _keeps_a_slice(fused, user)) for user in users
    )


def _dot_flops(one: Instruction, lhs: Shape) -> float:
    """2 x outputs x contracted. cuBLAS calls keep the numbers of the dimensions in their configuration."""
    pattern = r'"lhs_contracting_dimensions":\[([^\]]*)\]' if one.is_gemm else r"\blhs_contracting_dims={([\d,]*)}"
    contracted = hlo_text.numbers(one.find(pattern))
    return 2 * math.prod(one.shapes[0].dims) * math.prod(lhs.dims[dim] for dim in contracted)


def _convolution_flops(one: Instruction, lhs: Shape, rhs: Shape) -> float:
    """2 x batch x features in x features out x pairs of output and kernel positions inside the input."""
    lhs_labels, rhs_labels, out_labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes).groups()
    window = WINDOW | dict(re.findall(r"(\w+)=(\S+)", one.find(r"window={([^}]*)}")))
    spatial = sorted(label for label in lhs_labels if label.isdigit())
    pairs = 1
    for at, label in enumerate(spatial):
        stride, pad, lhs_dilation, rhs_dilation = ((window[name].split("x") * len(spatial))[at] for name in WINDOW)
        pairs *= _pairs_inside(
            inputs=lhs.dims[lhs_labels.index(label)],
            kernel=rhs.dims[rhs_labels.index(label)],
            outputs=one.shapes[0].dims[out_labels.index(label)],
            stride=int(stride),
            before=int(pad.split("_")[0]),
            lhs_dilation=int(lhs_dilation),
            rhs_dilation=int(rhs_dilation),
        )
    batch = lhs.dims[lhs_labels.index("b")] // int(one.find(r"batch_group_count=(\d+)") or 1)
    features = rhs.dims[rhs_labels.index("i")] * rhs.dims[rhs_labels.index("o")]
    return 2 * batch * features * pairs


def _pairs_inside(
    inputs: int, kernel: int, outputs: int, stride: int, before: int, lhs_dilation: int, rhs_dilation: int
) -> int:
    """The number of (output, kernel) positions of one axis that fall on an element of the input."""
    if (stride, before, lhs_dilation) == (1, 0, 1) and outputs + (kernel - 1) * rhs_dilation <= inputs:
        return outputs * kernel
    reach = (inputs - 1) * lhs_dilation
    at = np.add.outer(np.arange(outputs) * stride, np.arange(kernel) * rhs_dilation) - before
    return int(np.count_nonzero((at >= 0) & (at <= reach) & (at % lhs_dilation == 0)))


# ------------------------------------------------------------------------------------------------------------ printing


def table(total: Cost) -> str:
    """The cost in a few lines."""
    lines = [f"matmul FLOPs  {total.flops:.5g}, {total.recomputed_flops:.3g} of them the compiler's own remat"]
    lines.append(f"{'collective':<22}{'dtype':<8}{'count':>8}{'payload GiB':>14}{'wire GiB':>12}")
    for row in total.by_kind():
        payload, wire = row["payload"] / GiB, row["wire"] / GiB
        lines.append(f"{row['kind']:<22}{row['dtype']:<8}{row['count']:>8}{payload:>14.3f}{wire:>12.3f}")
    lines.append(f"{'in all':<38}{'':>14}{total.wire / GiB:>12.3f}")
    lines += [f"kernel        {count} x {name}" for name, count in sorted(total.kernels.items())]
    lines += [f"loop of unknown length, counted once: {name}" for name in total.unknown_loops]
    return "\n".join(lines)

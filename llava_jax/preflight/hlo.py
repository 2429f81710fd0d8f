"""What a compiled step does, read from its HLO text: FLOPs of matrix products, and collectives, loops unrolled.

XLA's own `cost_analysis` counts the body of a loop once and says nothing of collectives. The text of all three
compilers (TPU, GPU, CPU) is complete, if not alike:

- GPU and CPU write `known_trip_count` on loops; for TPU the loop's counter is interpreted.
- Matrix products are `dot`s, cuBLAS calls or, on TPU, `convolution`s in windows that partly lie in the padding: only
  pairs inside count, as in XLA's HloCostAnalysis.
- An asynchronous collective of TPU appears in the fusion that starts it, in those that it runs beside and in the one
  that ends it. Channel ids do not tell them apart, since `jax.shard_map` gives one id to many collectives.
- An all-reduce of which a fusion keeps a slice is a reduce-scatter. Outside of fusions, TPU writes even
  `psum_scatter` as an all-reduce, and counts here as what is written.
- Kernels (Pallas, cuDNN) hide their FLOPs: they are listed by name and have to be added by formula.

`python -m llava_jax.preflight.hlo FILE` prints the account of a saved text.
"""

import collections
import dataclasses
import functools
import math
import operator
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
# What is passed on unchanged where the value of a scalar is followed.
TRANSPARENT = {
    *("copy", "copy-start", "copy-done", "bitcast", "convert", "reshape", "opt-barrier", "optimization-barrier")
}
ARITHMETIC = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "divide": lambda a, b: int(a / b) if b else None,
    "remainder": lambda a, b: int(math.fmod(a, b)) if b else None,
    "minimum": min,
    "maximum": max,
    "and": operator.and_,
    "or": operator.or_,
}
COMPARISONS = {name: getattr(operator, name.lower()) for name in ("EQ", "NE", "LT", "LE", "GT", "GE")}
MOST_TRIPS = 1_000_000
# Custom calls that compute nothing.
BOOKKEEPING = ("AllocateBuffer", "AsyncCollective", "ConcatBitcast", "Sharding", "SPMD")


# ------------------------------------------------------------------------------------------------------- the account


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction."""

    kind: str  # one of `KINDS`, synchronous or not
    dtype: str  # of what travels, as HLO writes it ("bf16")
    payload: float  # bytes of the whole array on one device: what an all-gather makes, what the others start from
    group: tuple[int, ...]  # the devices (partition numbers) of the first group that exchanges data
    times: int  # how often a step runs it, loops unrolled
    name: str = ""
    op_name: str = ""  # what it was in JAX

    @property
    def wire(self) -> float:
        """Bytes that a device sends each time, around a ring."""
        n = len(self.group)
        shares = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0, "collective-broadcast": 1.0}
        return self.payload * shares.get(self.kind, (n - 1) / n)

    def crossing(self, host: Sequence[int]) -> float:
        """Bytes that a device sends to other hosts each time, `host[d]` being that of device d: what has to, if the
        devices of a host share the work."""
        hosts = len({host[device] for device in self.group})
        if hosts == 1:
            return 0.0
        away = (hosts - 1) / hosts
        if self.kind == "collective-permute":
            return self.payload
        if self.kind == "all-to-all":
            return self.payload * away
        return self.payload * away * hosts / len(self.group) * (2 if self.kind == "all-reduce" else 1)


@dataclasses.dataclass(frozen=True)
class Matmul:
    """One matrix product, with the fields of `Collective`."""

    flops: float  # each time, 2 a multiply-add
    dtype: str
    times: int
    name: str = ""
    op_name: str = ""
    recomputed: bool = False  # whether the compiler, short of memory, added it to what was asked for


@dataclasses.dataclass(frozen=True)
class Account:
    """What one device does in one run of a compiled program."""

    matmuls: tuple[Matmul, ...]
    collectives: tuple[Collective, ...]
    kernels: dict[str, int]  # how often each custom call runs; their FLOPs are unknown
    unknown_loops: tuple[str, ...]  # whose number of trips depends on data; they count as one trip

    @property
    def flops(self) -> float:
        return sum(matmul.flops * matmul.times for matmul in self.matmuls)

    @property
    def recomputed_flops(self) -> float:
        """The part of `flops` that the compiler added to fit into memory, as far as it says so."""
        return sum(matmul.flops * matmul.times for matmul in self.matmuls if matmul.recomputed)

    def recomputed_at(self, most: int = 3) -> dict[str, float]:
        """Where in the JAX program that is, and how many FLOPs: the largest parts."""
        places: collections.Counter[str] = collections.Counter()
        for matmul in self.matmuls:
            if matmul.recomputed:
                places[matmul.op_name] += matmul.flops * matmul.times
        return dict(places.most_common(most))

    @property
    def wire(self) -> float:
        return sum(collective.wire * collective.times for collective in self.collectives)

    def by_kind(self) -> list[dict[str, Any]]:
        """A row for each kind and dtype: `kind, dtype, count, payload, wire` (bytes of a step), most wire first."""
        rows: dict[tuple[str, str], dict[str, Any]] = {}
        for one in self.collectives:
            row = rows.setdefault(
                (one.kind, one.dtype), {"kind": one.kind, "dtype": one.dtype, "count": 0, "payload": 0.0, "wire": 0.0}
            )
            row["count"] += one.times
            row["payload"] += one.payload * one.times
            row["wire"] += one.wire * one.times
        return sorted(rows.values(), key=lambda row: -row["wire"])


def account(text: str) -> Account:
    """Reads the text of `compiled.as_text()`."""
    module = parse(text)
    walk = _Walk(module)
    walk.visit(module.computations[module.entry], 1, [])
    return walk.account()


# --------------------------------------------------------------------------------------------------------- the parser


class Shape(NamedTuple):
    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> float:
        bits = re.match(r"[a-z]+?(\d+)", self.dtype)
        width = 8 if self.dtype == "pred" else int(bits[1]) if bits else 0  # tokens have none
        return math.prod(self.dims) * width / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line. `shapes` are the leaves of its type, `attributes` what follows the operands, as written."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    is_tuple: bool
    operands: tuple[str, ...]
    literal: str
    attributes: str

    @functools.cached_property
    def op_name(self) -> str:
        return self.find(r'op_name="([^"]*)"')

    @functools.cached_property
    def target(self) -> str:
        """Of a custom call."""
        return self.find(r'custom_call_target="([^"]*)"')

    def callee(self, key: str) -> str:
        return self.find(rf"\b{key}=%?([\w.\-]+)")

    def ints(self, key: str) -> list[int]:
        """`key={1,2}` -> [1, 2]; [] where there is none."""
        return _numbers(self.find(rf"\b{key}={{([\d,]*)}}"))

    def find(self, pattern: str) -> str:
        """The group of a pattern in the attributes, "" where that is not found."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else ""


@dataclasses.dataclass
class Computation:
    name: str
    instructions: dict[str, Instruction]
    root: str = ""

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users = collections.defaultdict(list)
        for instruction in self.instructions.values():
            for operand in instruction.operands:
                users[operand].append(instruction)
        return users


@dataclasses.dataclass
class Module:
    computations: dict[str, Computation]
    entry: str
    partitions: int


def parse(text: str) -> Module:
    """Lines to instructions. What spans several lines (kernels carry their source) is passed over."""
    counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", text[: text.find("\n")])
    module = Module({}, "", max(map(int, counts), default=1))
    current = None
    for line in text.splitlines():
        if current is None:
            header = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line) if "->" in line else None
            if header:
                current = module.computations[header[2]] = Computation(header[2], {})
                module.entry = header[2] if header[1] else module.entry
        elif line == "}" or line.startswith("}, execution_thread="):
            current = None
        elif line.startswith("  ") and (match := re.match(r"  (ROOT )?%?([\w.\-]+) = ", line)):
            instruction = _instruction(match[2], line[match.end() :])
            if instruction:
                current.instructions[instruction.name] = instruction
                current.root = instruction.name if match[1] else current.root
    return module


def _instruction(name: str, rest: str) -> Instruction | None:
    rest = re.sub(r"/\*index=\d+\*/", "", rest)
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    match = re.match(r" *([\w\-]+)\(", rest[end:])
    if not match:
        return None
    opening = end + match.end() - 1
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    return Instruction(
        name=name,
        opcode=match[1],
        shapes=tuple(_shapes(rest[:end])),
        is_tuple=rest.startswith("("),
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
        literal=inside,
        attributes=rest[closing + 1 :],
    )


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis at `opening` closes."""
    depth = 0
    for position in range(opening, len(text)):
        if text[position] == "(":
            depth += 1
        elif text[position] == ")":
            depth -= 1
            if depth == 0:
                return position
    return len(text)


def _shapes(text: str) -> Iterator[Shape]:
    for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", text):
        yield Shape(dtype, tuple(int(dim.lstrip("<=")) for dim in dims.split(",") if dim))


# ----------------------------------------------------------------------------------------------------------- the walk


class _Walk:
    """Visits every instruction that runs, with how often it does."""

    def __init__(self, module: Module):
        self.module = module
        self.matmuls: list[Matmul] = []
        self.collectives: list[Collective] = []
        self.kernels: collections.Counter[str] = collections.Counter()
        self.unknown_loops: list[str] = []
        self.started = {
            _chain_key(one)
            for computation in module.computations.values()
            for one in computation.instructions.values()
            if _kind(one.opcode) and _is_start(computation, one)
        }

    def account(self) -> Account:
        return Account(tuple(self.matmuls), tuple(self.collectives), dict(self.kernels), tuple(self.unknown_loops))

    def visit(self, computation: Computation, times: int, arguments: list, recomputed: bool = False) -> None:
        """`arguments`: what is known of the values of the computation's parameters."""
        orphans = set()  # chains of which only continuations are here
        for one in computation.instructions.values():
            again = recomputed or ".remat" in one.name
            if one.opcode == "while":
                self.loop(computation, one, times, arguments, again)
            elif one.opcode == "fusion":
                self.fusion(self.module.computations[one.callee("calls")], times, again, orphans)
            elif one.opcode in ("call", "async-start"):
                callee = one.callee("to_apply") or one.callee("calls")
                values = [self.value(computation, operand, arguments, {}) for operand in one.operands]
                self.visit(self.module.computations[callee], times, values, again)
            elif one.opcode == "conditional":
                self.longest_branch(one, times, again)
            else:
                self.leaf(computation, one, times, again)

    def fusion(self, fused: Computation, times: int, recomputed: bool, orphans: set) -> None:
        for one in fused.instructions.values():
            if one.opcode == "fusion":
                self.fusion(self.module.computations[one.callee("calls")], times, recomputed, orphans)
            elif _kind(one.opcode) and _is_chained(fused, one) and not _is_start(fused, one):
                key = _chain_key(one)
                if key not in self.started and key not in orphans:
                    orphans.add(key)
                    self.leaf(fused, one, times, recomputed)
            else:
                self.leaf(fused, one, times, recomputed, fused=True)

    def longest_branch(self, one: Instruction, times: int, recomputed: bool) -> None:
        """Of a conditional, the branch with the most FLOPs, then bytes."""
        branches = re.findall(r"[\w.\-]+", one.find(r"branch_computations={([^}]*)}"))
        branches += [name for key in ("true_computation", "false_computation") if (name := one.callee(key))]
        walks = []
        for branch in branches:
            walk = _Walk(self.module)
            walk.visit(self.module.computations[branch], times, [], recomputed)
            walks.append(walk)
        longest = max(walks, key=lambda walk: (walk.account().flops, walk.account().wire))
        self.matmuls += longest.matmuls
        self.collectives += longest.collectives
        self.kernels += longest.kernels
        self.unknown_loops += longest.unknown_loops

    def leaf(
        self, computation: Computation, one: Instruction, times: int, recomputed: bool, fused: bool = False
    ) -> None:
        kind = _kind(one.opcode)
        if kind:
            if kind == "all-reduce" and fused and _keeps_a_slice(computation, one):
                kind = "reduce-scatter"
            self.collective(computation, one, kind, times)
        elif one.opcode in ("dot", "convolution") or _is_gemm(one):
            lhs, rhs = (computation.instructions[operand].shapes[0] for operand in one.operands[:2])
            flops = _convolution_flops(one, lhs, rhs) if one.opcode == "convolution" else _dot_flops(one, lhs)
            self.matmuls.append(Matmul(flops, lhs.dtype, times, one.name, one.op_name, recomputed))
        elif one.opcode == "custom-call" and not one.target.startswith(BOOKKEEPING):
            self.kernels[one.target] += times

    def collective(self, computation: Computation, one: Instruction, kind: str, times: int) -> None:
        group = _group(one, self.module.partitions)
        if len(group) < 2:
            return
        payloads: dict[str, float] = collections.defaultdict(float)
        for operand in one.operands:
            for shape in computation.instructions[operand].shapes:
                payloads[shape.dtype] += shape.bytes * (len(group) if kind == "all-gather" else 1)
        for dtype, payload in payloads.items():
            self.collectives.append(Collective(kind, dtype, payload, group, times, one.name, one.op_name))

    # ---- Loops

    def loop(self, computation: Computation, one: Instruction, times: int, arguments: list, recomputed: bool) -> None:
        body = self.module.computations[one.callee("body")]
        state = self.value(computation, one.operands[0], arguments, {})
        state = state if isinstance(state, list) else [None] * len(one.shapes)
        known = one.find(r'"known_trip_count":{"n":"(\d+)"}')
        trips = int(known) if known else self.trips(one, state)
        if trips is None:
            self.unknown_loops.append(one.name)
            trips = 1
        self.visit(body, times * trips, [self.invariants(body, state)], recomputed)

    def trips(self, one: Instruction, state: list) -> int | None:
        """Runs the loop on the scalars that it counts with; None where the condition depends on anything else."""
        body, condition = (self.module.computations[one.callee(key)] for key in ("body", "condition"))
        for trips in range(MOST_TRIPS):
            proceeds = self.value(condition, condition.root, [state], {})
            if proceeds is None:
                return None
            if not proceeds:
                return trips
            state = self.value(body, body.root, [state], {})
        return None

    def invariants(self, body: Computation, state: list) -> list:
        """Of a loop's state, what every trip leaves as it is."""
        root = body.instructions[body.root]
        if root.opcode != "tuple":
            return [None] * len(state)
        kept = [self.passed_through(body, operand) for operand in root.operands]
        return [value if index == at else None for at, (value, index) in enumerate(zip(state, kept, strict=True))]

    def passed_through(self, body: Computation, name: str) -> int | None:
        """The index in the state of which `name` is a copy."""
        one = body.instructions[name]
        while one.opcode in TRANSPARENT:
            one = body.instructions[one.operands[0]]
        if one.opcode == "get-tuple-element" and body.instructions[one.operands[0]].opcode == "parameter":
            return int(one.find(r"index=(\d+)"))
        return None

    def value(self, computation: Computation, name: str, arguments: list, memo: dict) -> Any:
        """The value of an integer scalar, a list of these for a tuple, None where it is not known."""
        if name not in memo:
            memo[name] = self._value(computation, computation.instructions[name], arguments, memo)
        return memo[name]

    def _value(self, computation: Computation, one: Instruction, arguments: list, memo: dict) -> Any:
        if not one.is_tuple and (one.shapes[0].dims or one.shapes[0].dtype[0] not in "sup"):
            return None
        if one.opcode == "constant":
            if one.shapes[0].dtype == "pred":
                return {"true": 1, "false": 0}.get(one.literal)
            return int(one.literal) if re.fullmatch(r"-?\d+", one.literal) else None
        if one.opcode == "parameter":
            number = int(one.literal)
            return arguments[number] if number < len(arguments) else None
        if one.opcode == "while":
            state = self.value(computation, one.operands[0], arguments, memo)
            body = self.module.computations[one.callee("body")]
            return self.invariants(body, state) if isinstance(state, list) else None
        values = [self.value(computation, operand, arguments, memo) for operand in one.operands]
        if one.opcode == "tuple":
            return values
        if one.opcode == "fusion":
            fused = self.module.computations[one.callee("calls")]
            return self.value(fused, fused.root, values, {})
        if not values or values[0] is None:
            return None
        if one.opcode == "get-tuple-element":
            return values[0][int(one.find(r"index=(\d+)"))]
        if one.opcode in TRANSPARENT:
            return values[0]
        if one.opcode == "not":
            return 1 - values[0]
        if None in values:
            return None
        if one.opcode == "compare":
            return int(COMPARISONS[one.find(r"direction=(\w+)")](*values))
        if one.opcode == "select":
            return values[1] if values[0] else values[2]
        if one.opcode in ARITHMETIC:
            return _wrap(ARITHMETIC[one.opcode](*values), one.shapes[0].dtype)
        return None


def _wrap(value: int | None, dtype: str) -> int | None:
    """As the type overflows."""
    if value is None or dtype == "pred":
        return value
    bits = int(dtype[1:])
    value %= 2**bits
    return value - 2**bits if dtype[0] == "s" and value >= 2 ** (bits - 1) else value


# ------------------------------------------------------------------------------------------------ kinds of instructions


def _kind(opcode: str) -> str | None:
    """The kind of collective that begins here; what ends one is none."""
    base = opcode.removesuffix("-start")
    return base if base in KINDS else "all-to-all" if base == "ragged-all-to-all" else None


def _is_gemm(one: Instruction) -> bool:
    return one.opcode == "custom-call" and one.target.startswith(("__cublas$gemm", "__cublas$lt$matmul"))


def _is_chained(fused: Computation, one: Instruction) -> bool:
    """Whether a collective in a fusion is a part of an asynchronous one of TPU."""
    return (
        'chain_id="' in one.attributes
        or fused.name.startswith("async_collective_fusion")
        or any(other.target.startswith("AsyncCollective") for other in fused.users[one.name])
    )


def _is_start(fused: Computation, one: Instruction) -> bool:
    return any(other.target == "AsyncCollectiveStart" for other in fused.users[one.name])


def _chain_key(one: Instruction) -> tuple:
    return one.find(r'chain_id="(\d+)"'), one.find(r"channel_id=(\d+)"), one.opcode, one.shapes, one.op_name


def _keeps_a_slice(fused: Computation, one: Instruction) -> bool:
    """Whether all that becomes of a result is a slice of it."""
    users = fused.users[one.name]
    return bool(users) and all(
        user.opcode == "dynamic-slice" or (user.opcode in TRANSPARENT and _keeps_a_slice(fused, user)) for user in users
    )


def _group(one: Instruction, partitions: int) -> tuple[int, ...]:
    """The first group of devices that talk to each other; of a permutation, all that send or receive."""
    if "source_target_pairs={" in one.attributes:
        pairs = re.findall(r"{(\d+),(\d+)}", one.find(r"source_target_pairs={((?:{\d+,\d+},?)*)}"))
        return tuple(sorted({int(device) for pair in pairs if pair[0] != pair[1] for device in pair}))
    if listed := one.find(r"replica_groups={{([\d,]+)}"):
        return tuple(_numbers(listed))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", one.attributes)
    if iota:
        (_, size), dims, order = (_numbers(part or "") for part in iota.groups())
        devices = np.arange(math.prod(dims)).reshape(dims)
        return tuple((devices.transpose(order) if order else devices).ravel()[:size].tolist())
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*{([^}]*)}", one.attributes)
    if mesh:
        return _mesh_group(mesh[1], mesh[2])
    return tuple(range(partitions))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _mesh_group(mesh: str, chosen: str) -> tuple[int, ...]:
    """`'a'=2,'b'=4` and `'b'` -> (0, 1, 2, 3). A part of an axis is written `'b':(2)2`: (skipped before it) size."""
    axes = [(name, int(size)) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh)]
    sizes = dict(axes)
    strides = {name: math.prod(size for _, size in axes[at + 1 :]) for at, (name, _) in enumerate(axes)}
    group = [0]
    for name, before, part in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", chosen):
        size = int(part) if part else sizes[name]
        stride = strides[name] * (sizes[name] // (int(before) * size) if part else 1)
        group = [start + step * stride for start in group for step in range(size)]
    return tuple(group)


def _dot_flops(one: Instruction, lhs: Shape) -> float:
    """2 x outputs x contracted. cuBLAS calls keep the numbers of the dimensions in their configuration."""
    contracted = one.ints("lhs_contracting_dims")
    if _is_gemm(one):
        contracted = _numbers(one.find(r'"lhs_contracting_dimensions":\[([^\]]*)\]'))
    return 2 * math.prod(one.shapes[0].dims) * math.prod(lhs.dims[dim] for dim in contracted)


def _convolution_flops(one: Instruction, lhs: Shape, rhs: Shape) -> float:
    """2 x batch x features in x features out x pairs of output and kernel positions that meet inside the input."""
    lhs_labels, rhs_labels, out_labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes).groups()
    fields = dict(re.findall(r"(\w+)=(\S+)", one.find(r"window={([^}]*)}")))
    spatial = sorted(label for label in lhs_labels if label.isdigit())
    pairs = 1
    for at, label in enumerate(spatial):

        def field(name: str, default: str, at: int = at) -> str:
            return fields[name].split("x")[at] if name in fields else default

        pairs *= _pairs_inside(
            inputs=lhs.dims[lhs_labels.index(label)],
            kernel=rhs.dims[rhs_labels.index(label)],
            outputs=one.shapes[0].dims[out_labels.index(label)],
            stride=int(field("stride", "1")),
            before=int(field("pad", "0_0").split("_")[0]),
            lhs_dilation=int(field("lhs_dilate", "1")),
            rhs_dilation=int(field("rhs_dilate", "1")),
        )
    batch = lhs.dims[lhs_labels.index("b")] // int(one.find(r"batch_group_count=(\d+)") or 1)
    features = rhs.dims[rhs_labels.index("i")] * rhs.dims[rhs_labels.index("o")]
    return 2 * batch * features * pairs


def _pairs_inside(
    inputs: int, kernel: int, outputs: int, stride: int, before: int, lhs_dilation: int, rhs_dilation: int
) -> int:
    """Of all (output, kernel) positions of one axis, those that fall on an element of the input."""
    if (stride, before, lhs_dilation) == (1, 0, 1) and outputs + (kernel - 1) * rhs_dilation <= inputs:
        return outputs * kernel
    reach = (inputs - 1) * lhs_dilation
    at = np.add.outer(np.arange(outputs) * stride, np.arange(kernel) * rhs_dilation) - before
    return int(np.count_nonzero((at >= 0) & (at <= reach) & (at % lhs_dilation == 0)))


# ------------------------------------------------------------------------------------------------------------ printing


def table(accounted: Account) -> str:
    """The account in a few lines."""
    lines = [f"matmul FLOPs  {accounted.flops:.5g}, {accounted.recomputed_flops:.3g} of them the compiler's own remat"]
    lines.append(f"{'collective':<22}{'dtype':<8}{'count':>8}{'payload GiB':>14}{'wire GiB':>12}")
    for row in accounted.by_kind():
        payload, wire = row["payload"] / 2**30, row["wire"] / 2**30
        lines.append(f"{row['kind']:<22}{row['dtype']:<8}{row['count']:>8}{payload:>14.3f}{wire:>12.3f}")
    lines.append(f"{'in all':<38}{'':>14}{accounted.wire / 2**30:>12.3f}")
    lines += [f"kernel        {count} x {name}" for name, count in sorted(accounted.kernels.items())]
    lines += [f"loop of unknown length, counted once: {name}" for name in accounted.unknown_loops]
    return "\n".join(lines)


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        print(table(account(file.read())))

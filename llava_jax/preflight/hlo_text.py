"""The HLO text of a compiled program as a typed graph: modules of computations of instructions.

The compilers for TPU, GPU and CPU write different texts; this reads all of them. `hlo_cost` adds up what a program
costs, `hlo_loops` finds how often its loops run.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast"
)  # fmt: skip
# Memory spaces of TPUs besides HBM.
ON_CHIP, HOST = 1, 5
_PARENTHESIS = re.compile(r"[()]")
# Operations that pass on a value or an array unchanged.
TRANSPARENT = frozenset(
    ("copy", "copy-start", "copy-done", "bitcast", "convert", "reshape", "opt-barrier", "optimization-barrier")
)


class Shape(NamedTuple):
    dtype: str
    dims: tuple[int, ...]
    space: int = 0  # of memory, see `ON_CHIP` and `HOST`

    @property
    def bytes(self) -> float:
        bits = re.match(r"[a-z]+?(\d+)", self.dtype)
        width = 8 if self.dtype == "pred" else int(bits[1]) if bits else 0  # tokens have none
        return math.prod(self.dims) * width / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line. `shapes` are the leaves of its type, `attributes` is the text after the operands."""

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
        """The function of a custom call."""
        return self.find(r'custom_call_target="([^"]*)"')

    @property
    def collective(self) -> str | None:
        """The kind of the collective that starts here. The end of an asynchronous one is none."""
        base = self.opcode.removesuffix("-start")
        return base if base in COLLECTIVES else "all-to-all" if base == "ragged-all-to-all" else None

    @property
    def is_gemm(self) -> bool:
        """Whether it calls cuBLAS."""
        return self.opcode == "custom-call" and self.target.startswith(("__cublas$gemm", "__cublas$lt$matmul"))

    @property
    def index(self) -> int:
        """Of a get-tuple-element."""
        return int(self.find(r"index=(\d+)"))

    def callee(self, key: str) -> str:
        """The name of the computation that it calls as `key`."""
        return self.find(rf"\b{key}=%?([\w.\-]+)")

    @property
    def callees(self) -> list[str]:
        """The computations that a call, the branches of a conditional or something asynchronous run."""
        branches = re.findall(r"[\w.\-]+", self.find(r"branch_computations={([^}]*)}"))
        keys = ("true_computation", "false_computation", "to_apply", "calls")
        return branches + [name for key in keys if (name := self.callee(key))]

    def find(self, pattern: str) -> str:
        """The first group of a pattern in the attributes, "" if it is not found."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else ""


@dataclasses.dataclass
class Computation:
    """Instructions by name; `root` is the name of the one whose value is the result."""

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
    """Computations by name; the program starts with the one named `entry`."""

    computations: dict[str, Computation]
    entry: str
    partitions: int  # devices

    def called(self, instruction: Instruction, key: str) -> Computation:
        """The computation that an instruction calls as `key`."""
        return self.computations[instruction.callee(key)]


def parse(text: str) -> Module:
    """Reads the text of `compiled.as_text()`. Lines that are no instruction, such as the source of a kernel, are
    skipped."""
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
    """The position of the parenthesis that closes the one at `opening`."""
    depth = 0
    for found in _PARENTHESIS.finditer(text, opening):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(text)


def _shapes(text: str) -> Iterator[Shape]:
    for dtype, dims, space in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{[^}]*S\((\d+)\)\})?", text):
        yield Shape(dtype, tuple(int(dim.lstrip("<=")) for dim in dims.split(",") if dim), int(space or 0))


# -------------------------------------------------------------------------------------------------- groups of devices


def device_group(instruction: Instruction, partitions: int) -> tuple[int, ...]:
    """The first group of devices that a collective connects; of a permutation, all that send or receive."""
    if "source_target_pairs={" in instruction.attributes:
        pairs = re.findall(r"{(\d+),(\d+)}", instruction.find(r"source_target_pairs={((?:{\d+,\d+},?)*)}"))
        return tuple(sorted({int(device) for pair in pairs if pair[0] != pair[1] for device in pair}))
    if listed := instruction.find(r"replica_groups={{([\d,]+)}"):
        return tuple(numbers(listed))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", instruction.attributes)
    if iota:
        (_, size), dims, order = (numbers(part or "") for part in iota.groups())
        devices = np.arange(math.prod(dims)).reshape(dims)
        return tuple((devices.transpose(order) if order else devices).ravel()[:size].tolist())
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*{([^}]*)}", instruction.attributes)
    if mesh:
        return _mesh_group(mesh[1], mesh[2])
    return tuple(range(partitions))


def numbers(text: str) -> list[int]:
    """All integers in a text."""
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

"""How often the loops of a compiled program run.

For GPU and CPU the compiler writes `known_trip_count`. For TPU it does not: the loop's counter is interpreted. A known
value is an int, for a tuple a list of known values, and None stands for a value that is not known.
"""

import math
import operator
import re
from typing import Any

from llava_jax.preflight.hlo_text import TRANSPARENT, Computation, Instruction, Module

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
MAX_TRIPS = 1_000_000


def unrolled(
    module: Module, computation: Computation, loop: Instruction, arguments: list
) -> tuple[Computation, list, int | None]:
    """The body of a loop, the known values of its parameters in every iteration, and how often it runs."""
    state, body = value(module, computation, loop.operands[0], arguments), module.called(loop, "body")
    state = state if isinstance(state, list) else [None] * len(loop.shapes)
    return body, [_invariants(body, state)], _trip_count(module, loop, state)


def _trip_count(module: Module, loop: Instruction, state: list) -> int | None:
    """How often a loop runs that starts with `state`; None if its condition depends on unknown values."""
    if known := loop.find(r'"known_trip_count":{"n":"(\d+)"}'):
        return int(known)
    body, condition = (module.called(loop, key) for key in ("body", "condition"))
    for trips in range(MAX_TRIPS):
        proceeds = value(module, condition, condition.root, [state])
        if proceeds is None:
            return None
        if not proceeds:
            return trips
        state = value(module, body, body.root, [state])
    return None


def _invariants(body: Computation, state: list) -> list:
    """The part of a loop's state that no iteration changes."""
    root = body.instructions[body.root]
    if root.opcode != "tuple":
        return [None] * len(state)
    kept = [_passed_through(body, operand) for operand in root.operands]
    return [known if index == at else None for at, (known, index) in enumerate(zip(state, kept, strict=True))]


def _passed_through(body: Computation, name: str) -> int | None:
    """The index in the state that `name` is a copy of."""
    one = body.instructions[name]
    while one.opcode in TRANSPARENT:
        one = body.instructions[one.operands[0]]
    if one.opcode == "get-tuple-element" and body.instructions[one.operands[0]].opcode == "parameter":
        return one.index
    return None


def value(module: Module, computation: Computation, name: str, arguments: list, memo: dict | None = None) -> Any:
    """The known value of an instruction. `arguments`: those of the computation's parameters."""
    memo = {} if memo is None else memo
    if name not in memo:
        memo[name] = _value(module, computation, computation.instructions[name], arguments, memo)
    return memo[name]


def _value(module: Module, computation: Computation, one: Instruction, arguments: list, memo: dict) -> Any:
    if not one.is_tuple and (one.shapes[0].dims or one.shapes[0].dtype[0] not in "sup"):
        return None  # no integer scalar
    if one.opcode == "constant":
        return _constant(one)
    if one.opcode == "parameter":
        number = int(one.literal)
        return arguments[number] if number < len(arguments) else None
    if one.opcode == "while":
        state = value(module, computation, one.operands[0], arguments, memo)
        return _invariants(module.called(one, "body"), state) if isinstance(state, list) else None
    values = [value(module, computation, operand, arguments, memo) for operand in one.operands]
    if one.opcode == "tuple":
        return values
    if one.opcode == "fusion":
        fused = module.called(one, "calls")
        return value(module, fused, fused.root, values)
    if not values or values[0] is None:
        return None
    if one.opcode == "get-tuple-element":
        return values[0][one.index]
    if one.opcode in TRANSPARENT:
        return values[0]
    return None if None in values else _computed(one, values)


def _constant(one: Instruction) -> int | None:
    if one.shapes[0].dtype == "pred":
        return {"true": 1, "false": 0}.get(one.literal)
    return int(one.literal) if re.fullmatch(r"-?\d+", one.literal) else None


def _computed(one: Instruction, values: list[int]) -> int | None:
    """The result of arithmetic on known values."""
    if one.opcode == "not":
        return 1 - values[0]
    if one.opcode == "compare":
        return int(COMPARISONS[one.find(r"direction=(\w+)")](*values))
    if one.opcode == "select":
        return values[1] if values[0] else values[2]
    if one.opcode in ARITHMETIC:
        return _wrap(ARITHMETIC[one.opcode](*values), one.shapes[0].dtype)
    return None


def _wrap(value: int | None, dtype: str) -> int | None:
    """The value after overflow in the type."""
    if value is None or dtype == "pred":
        return value
    bits = int(dtype[1:])
    value %= 2**bits
    return value - 2**bits if dtype[0] == "s" and value >= 2 ** (bits - 1) else value

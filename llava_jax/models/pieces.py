"""Pieces of stacked parameters: some layers of a stack, apart from the others.

`llm.layers.16:32.mlp.up_proj.kernel` is layers 16 to 31 of `llm.layers.mlp.up_proj.kernel`. A run that trains these has
a piece 0:16 among its frozen parameters and a piece 16:32 among the trained ones. The forward pass scans one after the
other (`Execution.scan_layers`), so frozen layers cost what other frozen parameters cost, and the step's checkpoint
stores the trained rows. All parameters of a stack are split between the same layers, so that no pass has to slice them.
"""

import itertools
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

# What computes the input of a stack of layers.
BEFORE_LAYERS = re.compile(r"vision\.(?!layers\.|post_layernorm)|llm\.embed_tokens")
_STACKED = re.compile(r"(?P<stack>\w+\.layers)\.(?:(?P<start>\d+):(?P<stop>\d+)\.)?(?P<leaf>.+)")


class Pieces(nnx.List):
    """The stacks that a stack was split into, in order: the `layers` of a model."""


# --------------------------------------------------------------------------------------------------------------- names


def stack_of(name: str) -> str | None:
    """`llm.layers` for its parameters; None for a parameter that is not stacked."""
    found = _STACKED.fullmatch(name)
    return found and found["stack"]


def whole(name: str) -> str:
    """The name of the parameter that a piece belongs to; that of a whole parameter is its own."""
    found = _STACKED.fullmatch(name)
    return f"{found['stack']}.{found['leaf']}" if found else name


def rows(name: str, leaf: Any) -> tuple[int, int]:
    """The rows of the whole parameter that `name`, of the shape of `leaf`, has: (first, last + 1)."""
    found = _STACKED.fullmatch(name)
    if found and found["start"]:
        return int(found["start"]), int(found["stop"])
    return 0, leaf.shape[0]


def piece(name: str, start: int, stop: int) -> str:
    """The name of some rows of a whole parameter."""
    found = _STACKED.fullmatch(name)
    return f"{found['stack']}.{start}:{stop}.{found['leaf']}"


def cuts(names: Iterable[str]) -> dict[str, list[int]]:
    """Where each stack is split, both ends included; stacks that are whole are left out."""
    found: dict[str, set[int]] = {}
    for name in names:
        match = _STACKED.fullmatch(name)
        if match and match["start"]:
            found.setdefault(match["stack"], set()).update((int(match["start"]), int(match["stop"])))
    return {stack: sorted(bounds) for stack, bounds in found.items()}


# ---------------------------------------------------------------------------------------------------------- parameters


def split(shapes: Mapping[str, Any], where: Mapping[str, Collection[int]]) -> dict[str, Any]:
    """Shapes and types by name, with each stack split before the layers `where[stack]`."""
    parts: dict[str, Any] = {}
    for name, leaf in shapes.items():
        cuts = where.get(stack_of(name), ())
        first, last = rows(name, leaf) if cuts else (0, 0)
        inner = sorted(cut for cut in cuts if first < cut < last)
        if not inner:
            parts[name] = leaf
            continue
        for start, stop in itertools.pairwise((first, *inner, last)):
            parts[piece(whole(name), start, stop)] = jax.ShapeDtypeStruct((stop - start, *leaf.shape[1:]), leaf.dtype)
    return parts


def take(params: Mapping[str, jax.Array], name: str) -> jax.Array:
    """The parameter or piece `name`, of whole parameters."""
    return params[name] if name in params else params[whole(name)][slice(*rows(name, None))]


def joined(params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Whole parameters, of all their pieces."""
    found: dict[str, list[tuple[int, jax.Array]]] = {}
    for name, value in params.items():
        found.setdefault(whole(name), []).append((rows(name, value)[0], value))
    ordered = {name: [value for _, value in sorted(parts, key=lambda part: part[0])] for name, parts in found.items()}
    return {name: parts[0] if len(parts) == 1 else jnp.concatenate(parts) for name, parts in ordered.items()}


# ------------------------------------------------------------------------------------------------------------- modules


def by_stack(params: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Of each stack that is split, the parameters of its pieces in order, by the names of whole ones."""
    bounds = cuts(params)
    found = {stack: [{} for _ in ends[1:]] for stack, ends in bounds.items()}
    for name, value in params.items():
        if (stack := stack_of(name)) in bounds:
            found[stack][bounds[stack].index(rows(name, value)[0])][whole(name)] = value
    return found


def first_layers(layers: nnx.Module, count: int) -> list[nnx.Module]:
    """The stacks that have the first `count` layers of a stack, which may be split."""
    found = []
    for stack in list(layers) if isinstance(layers, Pieces) else [layers]:
        size = len(jax.tree.leaves(stack)[0])
        if count < size:
            stack = jax.tree.map(lambda stacked, count=count: stacked[:count], stack)
        if count:
            found.append(stack)
        count = max(count - size, 0)
    return found

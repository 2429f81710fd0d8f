"""Devices as a mesh, and how parameters and batches lie on it.

Batches are split over `data` x `fsdp`; parameters, and optimizer state with them, over `fsdp` (ZeRO-3).
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax.cli import UserError

BATCH_AXES = ("data", "fsdp")


def make_mesh(axes: Mapping[str, int], devices: list | None = None) -> Mesh:
    """A mesh over all devices (of this process's platform, by default); one axis may be -1: what the others leave."""
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict(axes)
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or fixed < 1 or (len(devices) % fixed if free else len(devices) != fixed):
        raise UserError(f"config.mesh is {sizes}: does not make up {len(devices)} devices; let one axis be -1")
    for name in free:
        sizes[name] = len(devices) // fixed
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def axis_sizes(mesh: Mesh) -> dict[str, int]:
    """Sizes of data, fsdp and tensor."""
    return {"data": mesh.shape["data"], "fsdp": mesh.shape["fsdp"], "tensor": 1}


def batch_shards(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def param_sharding(mesh: Mesh, name: str, shape: tuple[int, ...]) -> NamedSharding:
    """Splits one axis over `fsdp`; what cannot be split is on every device."""
    axis = split_axis(shape, mesh.shape["fsdp"])
    return replicated(mesh) if axis is None else NamedSharding(mesh, P(*[None] * axis, "fsdp"))


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """The same for a tree of parameters, as the optimizer's state is."""
    return jax.tree.map(lambda leaf: param_sharding(mesh, "", leaf.shape), tree)


def split_axis(shape: tuple[int, ...], parts: int) -> int | None:
    """The longest axis of a matrix that divides into `parts`; None for vectors, scalars and where none divides."""
    divisible = [axis for axis, size in enumerate(shape) if size % parts == 0]
    return max(divisible, key=lambda axis: shape[axis]) if len(shape) > 1 and divisible else None

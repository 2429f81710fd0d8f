"""Devices as a mesh, and how parameters and batches lie on it.

Batches are split over `data` x `fsdp`; parameters, and optimizer state with them, over `fsdp` (ZeRO-3).
"""

import math
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax.cli import UserError

BATCH_AXES = ("data", "fsdp")


def make_mesh(axes: Mapping[str, int]) -> Mesh:
    """A mesh over all devices; one axis may be -1 and takes what the others leave."""
    devices = jax.device_count()
    sizes = dict(axes)
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or fixed < 1 or (devices % fixed if free else devices != fixed):
        raise UserError(f"config.mesh is {sizes}: does not make up {devices} devices; let one axis be -1")
    for name in free:
        sizes[name] = devices // fixed
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def batch_shards(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P(BATCH_AXES))


def local_groups(mesh: Mesh, groups: int) -> tuple[int, ...]:
    """Which of a batch's groups the devices of this process take, ascending."""
    slices = batch_sharding(mesh).addressable_devices_indices_map((groups,)).values()
    return tuple(sorted({group for (piece,) in slices for group in range(*piece.indices(groups))}))


def put_batch(mesh: Mesh, groups: int, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """A batch of `groups` groups on the devices of all processes, from arrays with this process's `local_groups`."""
    held = local_groups(mesh, groups)
    first = {group: position for position, group in enumerate(held)}

    def put(array: np.ndarray) -> jax.Array:
        rows = array.shape[0] // len(held)  # of a group

        def piece(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(groups * rows)
            begin = first[start // rows] * rows
            return array[begin : begin + stop - start]

        return jax.make_array_from_callback((groups * rows, *array.shape[1:]), batch_sharding(mesh), piece)

    return {name: put(array) for name, array in batch.items()}


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def param_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Splits one axis over `fsdp`; what cannot be split is on every device."""
    axis = split_axis(shape, mesh.shape["fsdp"])
    return replicated(mesh) if axis is None else NamedSharding(mesh, P(*[None] * axis, "fsdp"))


def split_axis(shape: tuple[int, ...], parts: int) -> int | None:
    """The longest axis of a matrix that divides into `parts`; None for vectors, scalars and where none divides."""
    divisible = [axis for axis, size in enumerate(shape) if size % parts == 0]
    return max(divisible, key=lambda axis: shape[axis]) if len(shape) > 1 and divisible else None

"""Devices as a mesh, and how parameters and batches lie on it.

A configuration gives the sizes of three axes:

  data    copies of the model, each with rows of its own
  fsdp    rows, and parameters and optimizer state split (ZeRO-3, Rajbhandari et al. 2020)
  tensor  the heads and the hidden units of each layer split (Shoeybi et al. 2019)

`data` and `fsdp` are manual: a training step is one `jax.shard_map` over them, in which a device sees its rows and its
pieces of the parameters, and `Fsdp.whole` gathers what a layer needs when it needs it. `tensor` is the compiler's: it
splits the arithmetic as the parameters are split.

In the mesh, `fsdp` is several axes, the rings that its devices form along the axes of a TPU's torus. A gradient is
summed and split along one ring after the other, which the TPU's compiler makes reduce-scatters of; along all of them
at once it sums the whole of it on every device, and sends twice as much.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax.cli import UserError

AXES = ("data", "fsdp", "tensor")
# One for each number in `position`.
FSDP_RINGS = ("fsdp_slice", "fsdp_x", "fsdp_y", "fsdp_z", "fsdp_core")
BATCH_AXES = ("data", *FSDP_RINGS)
MESH_AXES = (*BATCH_AXES, "tensor")

# Logical axis -> what may split it: the first that splits anything, divides it and is not used by an earlier axis.
RULES = {"embed": ("fsdp",), "heads": ("tensor", "fsdp"), "mlp": ("tensor", "fsdp"), "vocab": ("tensor",), None: ()}
# Pattern of a parameter's name -> its last logical axes. Earlier ones, as that of stacked layers, are not split, nor is
# anything of the vectors, which no pattern names.
PARAMETER_AXES: list[tuple[str, tuple[str | None, ...]]] = [
    (r"embed_tokens\.embedding$", ("vocab", "embed")),
    (r"lm_head\.kernel$", ("embed", "vocab")),
    (r"\b[qkv]_proj\.kernel$", ("embed", "heads")),
    (r"\b(o|out)_proj\.kernel$", ("heads", "embed")),
    (r"\b(gate_proj|up_proj|fc1)\.kernel$", ("embed", "mlp")),
    (r"\b(down_proj|fc2)\.kernel$", ("mlp", "embed")),
    (r"patch_embedding\.kernel$", (None, "embed")),
    (r"position_embedding$", (None, "embed")),
    (r"linear_\d+\.kernel$", ("embed", None)),
]
# More parameters than this whole on every device would be a mistake: 7B has 0.01 %.
MOST_REPLICATED = 0.02


# ------------------------------------------------------------------------------------------------------------ the mesh


def make_mesh(axes: Mapping[str, int], devices: Iterable[jax.Device] | None = None) -> Mesh:
    """A mesh over the devices (all, by default); one axis may be -1: what the others leave.

    `data` takes the outermost links, those between slices first, and `tensor` the innermost.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {axis: axes.get(axis, 1) for axis in AXES}
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    senseless = any(size < 1 and size != -1 for size in sizes.values()) or len(free) > 1
    if senseless or (len(devices) % fixed if free else len(devices) != fixed):
        raise UserError(
            f"config.mesh is {dict(axes)}: does not make up {len(devices)} devices; let one of {', '.join(AXES)} be -1"
        )
    for name in free:
        sizes[name] = len(devices) // fixed
    physical = arrange(devices)
    data, rings, tensor = factor(physical.shape, sizes["data"], sizes["tensor"])
    # Each physical axis is cut into its parts for data, fsdp and tensor, which are then brought together.
    parts = physical.reshape([size for cut in zip(data, rings, tensor, strict=True) for size in cut])
    parts = parts.transpose([*range(0, parts.ndim, 3), *range(1, parts.ndim, 3), *range(2, parts.ndim, 3)])
    shape = (sizes["data"], *rings, sizes["tensor"])
    return Mesh(parts.reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def position(device: jax.Device) -> tuple[int, ...]:
    """Where a device is: slice, x, y, z, core on its chip. Devices other than TPUs form one ring."""
    coordinates = getattr(device, "coords", None) if device.platform == "tpu" else None
    x, y, z = coordinates or (device.id, 0, 0)
    return getattr(device, "slice_index", None) or 0, x, y, z, (device.core_on_chip if coordinates else 0)


def arrange(devices: list[jax.Device]) -> np.ndarray:
    """The devices in an array by their `position`; in a row if they do not fill a box."""
    positions = [position(device) for device in devices]
    values = [sorted(set(along)) for along in zip(*positions, strict=True)]
    shape = tuple(len(along) for along in values)
    if math.prod(shape) != len(devices) or len(set(positions)) != len(devices):
        shape = (1, len(devices), 1, 1, 1)
    ordered = np.empty(len(devices), object)
    ordered[:] = [device for _, device in sorted(zip(positions, devices, strict=True), key=lambda pair: pair[0])]
    return ordered.reshape(shape)


def factor(shape: tuple[int, ...], data: int, tensor: int) -> tuple[list[int], list[int], list[int]]:
    """What data, fsdp and tensor get of each physical axis: data from the first on, tensor from the last."""
    rest, tensors = _take(list(shape)[::-1], tensor)
    rest, datas = _take(rest[::-1], data)
    return datas, rest, tensors[::-1]


def _take(sizes: list[int], wanted: int) -> tuple[list[int], list[int]]:
    """Takes a factor `wanted` out of the sizes, from the first on: (what is left, what was taken)."""
    left, taken = [], []
    for size in sizes:
        part = math.gcd(size, wanted)
        wanted //= part
        left.append(size // part)
        taken.append(part)
    if wanted > 1:
        raise UserError(f"config.mesh: a factor {wanted} cannot be had from devices arranged as {sizes}")
    return left, taken


def axis_sizes(mesh: Mesh) -> dict[str, int]:
    """Sizes of data, fsdp and tensor."""
    fsdp = math.prod(mesh.shape[ring] for ring in FSDP_RINGS)
    return {"data": mesh.shape["data"], "fsdp": fsdp, "tensor": mesh.shape["tensor"]}


def manual_axes(mesh: Mesh) -> frozenset[str]:
    """The axes over which a step is written out; one that splits nothing is none of the compiler's business either."""
    return frozenset(BATCH_AXES if mesh.shape["tensor"] > 1 else MESH_AXES)


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


# ---------------------------------------------------------------------------------------------------------- parameters


def fsdp_axis(name: str, ndim: int) -> int | None:
    """Which axis of a parameter `fsdp` splits where there is no `tensor`; None of the vectors."""
    logical = next((axes for pattern, axes in PARAMETER_AXES if re.search(pattern, name)), ())
    axes = (ndim - len(logical) + i for i, axis in enumerate(logical) if "fsdp" in RULES[axis])
    return next(axes, None)


def param_spec(mesh: Mesh, name: str, shape: tuple[int, ...]) -> P:
    """The mesh axes of each axis of a parameter."""
    logical = next((axes for pattern, axes in PARAMETER_AXES if re.search(pattern, name)), ())
    free = {axis: size for axis, size in axis_sizes(mesh).items() if size > 1}
    spec = [None] * (len(shape) - len(logical))
    for axis, size in zip(logical, shape[len(shape) - len(logical) :], strict=True):
        chosen = next((name for name in RULES[axis] if name in free and size % free[name] == 0), None)
        free.pop(chosen, None)
        spec.append(FSDP_RINGS if chosen == "fsdp" else chosen)
    return P(*spec)


def param_sharding(mesh: Mesh, name: str, shape: tuple[int, ...]) -> NamedSharding:
    return NamedSharding(mesh, param_spec(mesh, name, shape))


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """The same for a tree whose dicts are keyed by names of parameters, as that of Optax; the rest is replicated."""

    def place(path: tuple, leaf: Any) -> NamedSharding:
        name = path[-1].key if path and isinstance(path[-1], jax.tree_util.DictKey) else ""
        return param_sharding(mesh, name, leaf.shape)

    return jax.tree_util.tree_map_with_path(place, tree)


def check_replicated(mesh: Mesh, shapes: Mapping[str, Any]) -> None:
    """Raises UserError if every device would hold more than 2 % of the parameters of these shapes whole."""
    if mesh.size == mesh.shape["data"]:
        return  # nothing is to be split
    whole = {n: math.prod(v.shape) for n, v in shapes.items() if not any(param_spec(mesh, n, v.shape))}
    share = sum(whole.values()) / sum(math.prod(value.shape) for value in shapes.values())
    if share > MOST_REPLICATED:
        largest = max(whole, key=whole.get)
        raise UserError(
            f"config.mesh {axis_sizes(mesh)} would put {share:.1%} of the parameters on every device, most of them "
            f"{largest} {shapes[largest].shape}, which does not divide; choose fsdp and tensor that divide its axes"
        )


# ---------------------------------------------------------------------------------------------- inside a training step


class Piece(NamedTuple):
    """A device's piece of a trained weight, and zeros of its shape in whose place its gradient is taken.

    The gradient of the weight itself would be float32, as the weight is. That of the zeros, which nothing reads and the
    compiler drops, is in the type in which gradients are summed: half the memory for all layers' gradients, no bit
    less.
    """

    weight: jax.Array
    gradient: jax.Array


@dataclasses.dataclass(frozen=True)
class Fsdp:
    """What a device does, inside a `jax.shard_map` over `data` and `fsdp`, to compute with pieces of parameters."""

    specs: Mapping[str, P]  # mesh axes by name of parameter
    dtype: jnp.dtype  # in which weights travel

    def whole(self, prefix: str, module: Any) -> Any:
        """A module (`prefix` is its name) with whole weights. Gradients come back summed, each device its piece."""

        def gather(path: tuple, piece: jax.Array | Piece) -> jax.Array:
            weight, gradient = piece if isinstance(piece, Piece) else (piece, None)
            axis = self._split_axis(".".join((prefix, *_names(path))), weight.ndim)
            return weight if axis is None else whole_weight(weight.astype(self.dtype), gradient, axis)

        return jax.tree_util.tree_map_with_path(gather, module, is_leaf=lambda node: isinstance(node, Piece))

    def gathered(self, name: str) -> bool:
        """Whether `whole` makes a parameter of pieces. The table of embeddings stays in pieces for `lookup`."""
        return FSDP_RINGS in self.specs[name] and not name.endswith("embed_tokens.embedding")

    def lookup(self, name: str, embedding: Callable[[jax.Array], jax.Array], tokens_BT: jax.Array) -> jax.Array:
        """Rows [B, T, D] of a table of which a device has some columns: the tokens travel instead of the table."""
        if self._split_axis(name, 2) is None:
            return embedding(tokens_BT)
        everyones_tokens = jax.lax.all_gather(tokens_BT, FSDP_RINGS, tiled=True)
        columns = embedding(everyones_tokens).astype(self.dtype)
        return jax.lax.all_to_all(columns, FSDP_RINGS, split_axis=0, concat_axis=2, tiled=True)

    def _split_axis(self, name: str, ndim: int) -> int | None:
        """Which of a parameter's last `ndim` axes is split over `fsdp`."""
        spec = tuple(self.specs[name])[-ndim:]
        return spec.index(FSDP_RINGS) if FSDP_RINGS in spec else None


def sum_over(axes: Iterable[str], x: jax.Array) -> jax.Array:
    """`jax.lax.psum`, not over axes of one device: what they leave keeps compilers from splitting over `tensor`."""
    axes = [axis for axis in axes if jax.lax.axis_size(axis) > 1]
    return jax.lax.psum(x, axes) if axes else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def whole_weight(weight: jax.Array, gradient: jax.Array | None, axis: int) -> jax.Array:
    """The whole of which each device along the rings has a piece, gathered ring by ring."""
    for ring in reversed(FSDP_RINGS):
        if jax.lax.axis_size(ring) > 1:
            weight = jax.lax.all_gather(weight, ring, axis=axis, tiled=True)
    return weight


def _whole_weight_forward(weight: jax.Array, gradient: jax.Array | None, axis: int) -> tuple[jax.Array, tuple | None]:
    return whole_weight(weight, gradient, axis), None if gradient is None else ()


def _whole_weight_backward(
    axis: int, taken: tuple | None, d_whole: jax.Array
) -> tuple[jax.Array | None, jax.Array | None]:
    """Everybody's gradients are summed, and each device keeps its piece: as `gradient`'s, or else as the weight's."""
    for ring in FSDP_RINGS:
        if jax.lax.axis_size(ring) > 1:
            d_whole = jax.lax.psum_scatter(d_whole, ring, scatter_dimension=axis, tiled=True)
    return (d_whole, None) if taken is None else (None, d_whole)


whole_weight.defvjp(_whole_weight_forward, _whole_weight_backward)


def _names(path: Iterable[jax.tree_util.GetAttrKey]) -> list[str]:
    """The attributes that lead to a module's parameter; the last key of the path is the variable's value."""
    return [key.name for key in tuple(path)[:-1]]

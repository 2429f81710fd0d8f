"""The device mesh, and how parameters and batches are sharded over it.

A configuration gives the sizes of three axes:

  data    replicas of the model; each takes other rows of the batch
  fsdp    shards rows, parameters and optimizer state (ZeRO-3, Rajbhandari et al. 2020)
  tensor  shards the heads and the hidden units of each layer (Shoeybi et al. 2019)

`data` and `fsdp` are manual: a training step is one `jax.shard_map` over them, in which a device has its rows and its
shards of the parameters, and `Fsdp.gather` gathers the weights of a layer when the layer needs them. `tensor` is
automatic: the compiler shards the computation as the parameters are sharded.

In the mesh, `fsdp` is several axes: the rings that its devices form along the axes of a TPU's torus. A gradient is
summed and scattered along one ring after the other, for which the TPU compiler emits reduce-scatters. Along all rings
at once it would emit an all-reduce, which sends twice as much.
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

# Logical axis -> the mesh axes that may shard it: the first that is larger than 1, divides it and is still free does.
RULES = {"embed": ("fsdp",), "heads": ("tensor", "fsdp"), "mlp": ("tensor", "fsdp"), "vocab": ("tensor",), None: ()}
# Pattern of parameter names -> the last logical axes. Earlier axes, such as that of stacked layers, are not sharded.
# Vectors match no pattern and are not sharded.
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
CODE_ROWS = 32  # rows of codes of a block, see `models.quantized`
# A larger share of replicated parameters is a mistake: 7B has 0.01 %.
MAX_REPLICATED = 0.02


# ------------------------------------------------------------------------------------------------------------ the mesh


def make_mesh(axes: Mapping[str, int], devices: Iterable[jax.Device] | None = None) -> Mesh:
    """A mesh over the devices (by default all). An axis of size -1 takes the devices that the others leave.

    `data` takes the outermost links, those between slices first, and `tensor` the innermost. Raises UserError if the
    sizes don't fit the devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {axis: axes.get(axis, 1) for axis in AXES}
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    invalid = any(size < 1 and size != -1 for size in sizes.values()) or len(free) > 1
    if invalid or (len(devices) % fixed if free else len(devices) != fixed):
        raise UserError(
            f"config.mesh is {dict(axes)}: its product is not {len(devices)} devices; "
            f"let one of {', '.join(AXES)} be -1"
        )
    for name in free:
        sizes[name] = len(devices) // fixed
    physical = arrange(devices)
    data, rings, tensor = factor(physical.shape, sizes["data"], sizes["tensor"])
    # Each physical axis is factored for data, fsdp and tensor; then the factors of each are brought together.
    parts = physical.reshape([size for cut in zip(data, rings, tensor, strict=True) for size in cut])
    parts = parts.transpose([*range(0, parts.ndim, 3), *range(1, parts.ndim, 3), *range(2, parts.ndim, 3)])
    shape = (sizes["data"], *rings, sizes["tensor"])
    return Mesh(parts.reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def position(device: jax.Device) -> tuple[int, ...]:
    """The position of a device: slice, x, y, z, core on its chip. Devices other than TPUs form one ring."""
    coordinates = getattr(device, "coords", None) if device.platform == "tpu" else None
    x, y, z = coordinates or (device.id, 0, 0)
    return getattr(device, "slice_index", None) or 0, x, y, z, (device.core_on_chip if coordinates else 0)


def arrange(devices: list[jax.Device]) -> np.ndarray:
    """The devices in an array by `position`, or in a single ring if they don't fill a box."""
    positions = [position(device) for device in devices]
    values = [sorted(set(along)) for along in zip(*positions, strict=True)]
    shape = tuple(len(along) for along in values)
    if math.prod(shape) != len(devices) or len(set(positions)) != len(devices):
        shape = (1, len(devices), 1, 1, 1)
    ordered = np.empty(len(devices), object)
    ordered[:] = [device for _, device in sorted(zip(positions, devices, strict=True), key=lambda pair: pair[0])]
    return ordered.reshape(shape)


def factor(shape: tuple[int, ...], data: int, tensor: int) -> tuple[list[int], list[int], list[int]]:
    """The factors of each physical axis for data, fsdp and tensor: data takes the first axes, tensor the last."""
    rest, tensors = _take(list(shape)[::-1], tensor)
    rest, datas = _take(rest[::-1], data)
    return datas, rest, tensors[::-1]


def _take(sizes: list[int], wanted: int) -> tuple[list[int], list[int]]:
    """Divides the sizes by a factor `wanted`, the first sizes first; returns the quotients and the divisors."""
    left, taken = [], []
    for size in sizes:
        part = math.gcd(size, wanted)
        wanted //= part
        left.append(size // part)
        taken.append(part)
    if wanted > 1:
        raise UserError(f"config.mesh: devices arranged as {sizes} do not divide by a factor {wanted}")
    return left, taken


def axis_sizes(mesh: Mesh) -> dict[str, int]:
    """Sizes of data, fsdp and tensor."""
    fsdp = math.prod(mesh.shape[ring] for ring in FSDP_RINGS)
    return {"data": mesh.shape["data"], "fsdp": fsdp, "tensor": mesh.shape["tensor"]}


def manual_axes(mesh: Mesh) -> frozenset[str]:
    """The axes of the `jax.shard_map` of a step; `tensor` is one of them unless the compiler shards over it."""
    return frozenset(BATCH_AXES if mesh.shape["tensor"] > 1 else MESH_AXES)


def batch_shards(mesh: Mesh) -> int:
    """The number of devices that the rows of a batch are sharded over."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P(BATCH_AXES))


def local_groups(mesh: Mesh, groups: int) -> tuple[int, ...]:
    """The groups of a batch that the devices of this process take, ascending."""
    slices = batch_sharding(mesh).addressable_devices_indices_map((groups,)).values()
    return tuple(sorted({group for (part,) in slices for group in range(*part.indices(groups))}))


def put_batch(mesh: Mesh, groups: int, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Puts a batch of `groups` groups on the devices; every process passes arrays with its `local_groups`."""
    held = len(local_groups(mesh, groups))
    shapes = {name: (len(array) // held * groups, *array.shape[1:]) for name, array in batch.items()}
    return jax.make_array_from_process_local_data(batch_sharding(mesh), dict(batch), shapes)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


# ---------------------------------------------------------------------------------------------------------- parameters


def logical_axes(name: str) -> tuple[str | None, ...]:
    """The last logical axes of a parameter. An adapter and a quantized weight are sharded as their kernel would be, and
    some layers of a stack (`models.pieces`) as all of them."""
    kernel = re.sub(r"\.(lora\.[ab]|codes|absmax)$", ".kernel", re.sub(r"\.\d+:\d+\.", ".", name))
    axes = next((axes for pattern, axes in PARAMETER_AXES if re.search(pattern, kernel)), ())
    if axes and name.endswith((".lora.a", ".lora.b")):
        return (axes[0], None) if name.endswith("a") else (None, axes[1])
    return axes


def fsdp_axis(name: str, ndim: int) -> int | None:
    """The axis of a parameter that `fsdp` shards if `tensor` is 1; None for vectors."""
    logical = logical_axes(name)
    axes = (ndim - len(logical) + i for i, axis in enumerate(logical) if "fsdp" in RULES[axis])
    return next(axes, None)


def param_spec(mesh: Mesh, name: str, shape: tuple[int, ...]) -> P:
    """The mesh axes that shard each axis of a parameter."""
    logical = logical_axes(name)
    if name.endswith(".codes") and shape[-2] % CODE_ROWS == 0:  # shards have whole blocks, as those of their scales
        shape = (*shape[:-2], shape[-2] // CODE_ROWS, shape[-1])
    free = {axis: size for axis, size in axis_sizes(mesh).items() if size > 1}
    spec = [None] * (len(shape) - len(logical))
    for axis, size in zip(logical, shape[len(shape) - len(logical) :], strict=True):
        chosen = next((name for name in RULES[axis] if name in free and size % free[name] == 0), None)
        free.pop(chosen, None)
        spec.append(FSDP_RINGS if chosen == "fsdp" else chosen)
    return P(*spec)


def param_sharding(mesh: Mesh, name: str, shape: tuple[int, ...]) -> NamedSharding:
    return NamedSharding(mesh, param_spec(mesh, name, shape))


def tree_shardings(mesh: Mesh, tree: Any, params: Mapping[str, Any]) -> Any:
    """Shardings of a tree such as an Optax state, whose dicts have the names of `params` (arrays or shapes) as keys.

    A leaf under such a name is sharded like the parameter, along the axes that it has of it: a mean over one axis along
    the others. The rest is replicated.
    """

    def place(path: tuple, leaf: Any) -> NamedSharding:
        keys = (key.key for key in reversed(path) if isinstance(key, jax.tree_util.DictKey))
        name = next((key for key in keys if key in params), None)
        if name is None:
            return replicated(mesh)
        shape = params[name].shape
        return NamedSharding(mesh, _spec_of_part(param_spec(mesh, name, shape), shape, leaf.shape))

    return jax.tree_util.tree_map_with_path(place, tree)


def _spec_of_part(spec: P, shape: tuple[int, ...], part: tuple[int, ...]) -> P:
    """The spec of an array whose axes are, in order, some of those of a parameter, known by their sizes."""
    left = iter(range(len(shape)))
    axes = [next((axis for axis in left if shape[axis] == size), None) for size in part]
    return P() if None in axes else P(*(spec[axis] for axis in axes))


def check_replicated(mesh: Mesh, shapes: Mapping[str, Any]) -> None:
    """Raises UserError if more than 2 % of the parameters of these shapes would be replicated."""
    if mesh.size == mesh.shape["data"]:
        return  # nothing is sharded
    replicated = {n: math.prod(v.shape) for n, v in shapes.items() if not any(param_spec(mesh, n, v.shape))}
    share = sum(replicated.values()) / sum(math.prod(value.shape) for value in shapes.values())
    if share > MAX_REPLICATED:
        largest = max(replicated, key=replicated.get)
        raise UserError(
            f"config.mesh {axis_sizes(mesh)} would replicate {share:.1%} of the parameters on every device, most of "
            f"them {largest} {shapes[largest].shape}; choose sizes of fsdp and tensor that divide its axes"
        )


# ---------------------------------------------------------------------------------------------- inside a training step


class ShardedWeight(NamedTuple):
    """A device's shard of a trained weight, float32, and its gradient accumulator: zeros of the same shape.

    The gradient of the weight is returned as that of the accumulator, in the accumulator's type, see
    `step._loss_and_gradients`.
    """

    shard: jax.Array
    accumulator: jax.Array


@dataclasses.dataclass(frozen=True)
class Fsdp:
    """Computes with sharded parameters inside a `jax.shard_map` over `data` and `fsdp`."""

    specs: Mapping[str, P]  # mesh axes by name of parameter
    dtype: jnp.dtype  # of the weights that are sent

    def gather(self, prefix: str, module: Any) -> Any:
        """All-gathers the weights of a module with the name `prefix`. Their gradients are reduce-scattered."""

        def gather(path: tuple, leaf: jax.Array | ShardedWeight) -> jax.Array:
            shard, accumulator = leaf if isinstance(leaf, ShardedWeight) else (leaf, None)
            axis = self._sharded_axis(".".join((prefix, *_names(path))), shard.ndim)
            if axis is None:
                return shard
            if jnp.issubdtype(shard.dtype, jnp.integer):  # quantized: gathered as it is, and without a gradient
                return all_gather(shard, axis)
            return gather_weight(shard.astype(self.dtype), accumulator, axis)

        return jax.tree_util.tree_map_with_path(gather, module, is_leaf=lambda node: isinstance(node, ShardedWeight))

    def gathers(self, name: str) -> bool:
        """Whether `gather` gathers a parameter: all that are sharded, but not the embeddings, see `lookup`."""
        return FSDP_RINGS in self.specs[name] and not name.endswith("embed_tokens.embedding")

    def lookup(self, name: str, embedding: Callable[[jax.Array], jax.Array], tokens_BT: jax.Array) -> jax.Array:
        """Word embeddings [B, T, D] from a table sharded by columns: tokens are sent instead of the table."""
        if self._sharded_axis(name, 2) is None:
            return embedding(tokens_BT)
        all_tokens_BT = jax.lax.all_gather(tokens_BT, FSDP_RINGS, tiled=True)
        columns = embedding(all_tokens_BT).astype(self.dtype)
        return jax.lax.all_to_all(columns, FSDP_RINGS, split_axis=0, concat_axis=2, tiled=True)

    def _sharded_axis(self, name: str, ndim: int) -> int | None:
        """Which of a parameter's last `ndim` axes is sharded over `fsdp`."""
        spec = tuple(self.specs.get(name, ()))[-ndim:]  # what is no parameter, such as seeds of dropout, has no spec
        return spec.index(FSDP_RINGS) if FSDP_RINGS in spec else None


def on_whole_matrices(
    function: Callable[[jax.Array], jax.Array], mesh: Mesh | None, spec: P, x_LIO: jax.Array
) -> jax.Array:
    """`function`, which maps each of the matrices that it is given to one of the same shape, of a sharded stack.

    The devices that share matrices exchange their shards so that each has some matrices whole, and then back: two
    all-to-alls for each sharded axis. `spec` shards the stack; no mesh is one device.
    """
    sharded = [(axis, names) for axis, names in enumerate(spec) if names]
    if not sharded:
        return function(x_LIO)

    def on_device(shard: jax.Array) -> jax.Array:
        matrices = len(shard)
        missing = -matrices % math.prod(jax.lax.axis_size(names) for _, names in sharded)
        shard = jnp.pad(shard, ((0, missing), (0, 0), (0, 0)))
        for axis, names in sharded:
            shard = jax.lax.all_to_all(shard, names, split_axis=0, concat_axis=axis, tiled=True)
        shard = function(shard)
        for axis, names in reversed(sharded):
            shard = jax.lax.all_to_all(shard, names, split_axis=axis, concat_axis=0, tiled=True)
        return shard[:matrices]

    return jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(x_LIO)


def sum_over(axes: Iterable[str], x: jax.Array) -> jax.Array:
    """`jax.lax.psum`, without axes of size 1: sums over them keep compilers from sharding over `tensor`."""
    axes = [axis for axis in axes if jax.lax.axis_size(axis) > 1]
    return jax.lax.psum(x, axes) if axes else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def gather_weight(shard: jax.Array, accumulator: jax.Array | None, axis: int) -> jax.Array:
    """All-gathers a weight along `axis`, ring by ring.

    The backward pass reduce-scatters the gradient and returns it for the accumulator or, without one, for the shard.
    """
    return all_gather(shard, axis)


def all_gather(shard: jax.Array, axis: int) -> jax.Array:
    for ring in reversed(FSDP_RINGS):
        if jax.lax.axis_size(ring) > 1:
            shard = jax.lax.all_gather(shard, ring, axis=axis, tiled=True)
    return shard


def _gather_forward(shard: jax.Array, accumulator: jax.Array | None, axis: int) -> tuple[jax.Array, tuple | None]:
    return gather_weight(shard, accumulator, axis), None if accumulator is None else ()


def _gather_backward(
    axis: int, accumulates: tuple | None, d_weight: jax.Array
) -> tuple[jax.Array | None, jax.Array | None]:
    for ring in FSDP_RINGS:
        if jax.lax.axis_size(ring) > 1:
            d_weight = jax.lax.psum_scatter(d_weight, ring, scatter_dimension=axis, tiled=True)
    return (d_weight, None) if accumulates is None else (None, d_weight)


gather_weight.defvjp(_gather_forward, _gather_backward)


def _names(path: Iterable[jax.tree_util.GetAttrKey]) -> list[str]:
    """The attributes on the path to a parameter of a module; the last key is the value of the variable."""
    return [key.name for key in tuple(path)[:-1]]

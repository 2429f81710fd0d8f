"""The arrays of Orbax checkpoints in pieces, by TensorStore.

Orbax itself writes and reads whole arrays. A stacked parameter of a large model is gigabytes, more than a machine that
converts weights may have, so an import writes it layer by layer, and an export reads it so. What is written here is a
checkpoint as any other: `orbax.checkpoint` loads it, on any number of hosts and devices.
"""

import collections
import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from etils import epath
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint._src.serialization import tensorstore_utils

from llava_jax.parallel.sharding import fsdp_axis
from llava_jax.remote import is_remote

TREE = "state"  # the directory of a tree that `ocp.save` was given
# A layer is a file (a shard, in Zarr's words) and is read in parts: as many as the devices that may split it, but none
# so small that there were more requests than bytes.
MOST_PARTS = 64
LEAST_PART_BYTES = 2**20
# What may wait for the disk. A single array may be larger: then it waits alone.
PENDING_BYTES = 2**29
CHECKSUM = {"name": "crc32c"}  # the codec of Zarr that appends a CRC-32C to each chunk and verifies it when it is read


def _with_checksum(build: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Adds `CHECKSUM` to the codecs that Orbax writes arrays with. Its own cover the indices, but not the data."""

    @functools.wraps(build)
    def metadata(*args: Any, **options: Any) -> dict[str, Any]:
        array = build(*args, **options)
        for sharding in array["codecs"]:
            sharding["configuration"]["codecs"].append(CHECKSUM)
        return array

    return metadata


# Orbax has no option for it.
tensorstore_utils._build_zarr3_metadata = _with_checksum(tensorstore_utils._build_zarr3_metadata)


class ArrayWriter:
    """A new Orbax checkpoint in `directory`, which must not exist, of arrays that are written piece by piece.

    Use within `with`, which waits for the disk at its end. Raises whatever TensorStore does.
    """

    def __init__(self, directory: epath.Path, arrays: dict[str, jax.ShapeDtypeStruct]):
        context = ocp.Context()
        context.array.saving.use_ocdbt = False
        context.array.saving.enable_write_sharding_file = False
        context.array.saving.array_metadata_store = None
        with context:  # writes the tree, and scalars in the place of its arrays
            ocp.save(directory, {name: jnp.zeros((), array.dtype) for name, array in arrays.items()})
        self._stores = {name: _create(directory / TREE / name, name, array) for name, array in arrays.items()}
        self._left = {name: math.prod(array.shape) for name, array in arrays.items()}
        self._pending = collections.deque()
        self._pending_bytes = 0

    def __enter__(self) -> "ArrayWriter":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        errors = [self._wait() for _ in range(len(self._pending))]  # all, so that nothing is written afterwards
        if kind is not None:
            return
        for error in filter(None, errors):
            raise error
        if any(self._left.values()):
            raise ValueError(f"not all was written: {', '.join(name for name, left in self._left.items() if left)}")

    def write(self, name: str, index: int | None, piece: np.ndarray) -> None:
        """Writes one index of an array's first axis, or with None all of it. The piece must not change afterwards."""
        while self._pending and self._pending_bytes + piece.nbytes > PENDING_BYTES:
            if error := self._wait():
                raise error
        store = self._stores[name] if index is None else self._stores[name][index]
        if piece.dtype != store.dtype.numpy_dtype or piece.shape != store.shape:
            raise ValueError(f"{name} is {piece.dtype}{piece.shape}, not {store.dtype.name}{store.shape}")
        written = store.write(piece, can_reference_source_data_indefinitely=True)
        self._pending.append((written, piece.nbytes))
        self._pending_bytes += piece.nbytes
        self._left[name] -= piece.size

    def _wait(self) -> Exception | None:
        """Why the oldest write failed, if it did."""
        written, size = self._pending.popleft()
        self._pending_bytes -= size
        return written.exception()


def layer_by_layer() -> ocp.Context:
    """In which Orbax writes layered arrays so that one layer can be read by itself."""

    def options(keypath: tuple, value: Any) -> ocp.options.ArrayOptions.Saving.StorageOptions | None:
        layered = is_layered(jax.tree_util.keystr(keypath), np.ndim(value))
        return ocp.options.ArrayOptions.Saving.StorageOptions(shard_axes=(0,)) if layered else None

    context = ocp.Context()
    context.array.saving.scoped_storage_options_creator = options
    return context


def is_layered(name: str, ndim: int) -> bool:
    """Whether a parameter lies on disk as one piece a layer: matrices do, the vectors of all layers are one piece."""
    return ".layers." in name and ndim > 2


def open_array(directory: epath.Path, name: str) -> ts.TensorStore:
    """An array of the tree that Orbax keeps in `directory`, to be read by `[index].read().result()`."""
    if (directory / "manifest.ocdbt").exists():
        store = {"driver": "ocdbt", "base": _kvstore(directory), "path": f"{name}/"}
    else:
        store = _kvstore(directory / name)
    # A missing chunk is an error, as it is for Orbax, which writes zeros too.
    spec = {"driver": "zarr3", "kvstore": store, "fill_missing_data_reads": False}
    return ts.open(spec, open=True, read=True).result()


def parts_of(array: ts.TensorStore) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """An array in the parts that it is stored in, each with its place.

    A part is small enough for memory that was just given back, while for a layer at once the system makes new pages,
    twice, which takes it longer than all else that an export does.
    """
    shape, part = array.shape, array.chunk_layout.read_chunk.shape
    axis = next((axis for axis in range(array.rank) if part[axis] < shape[axis]), None)
    if axis is None:
        yield (slice(None),) * array.rank, array.read().result()
        return
    for start in range(0, shape[axis], part[axis]):
        place = [slice(None)] * array.rank
        place[axis] = slice(start, min(start + part[axis], shape[axis]))
        yield tuple(place), array[tuple(place)].read().result()


def _create(directory: epath.Path, name: str, array: jax.ShapeDtypeStruct) -> ts.TensorStore:
    """An empty array in the place of what is there."""
    layer = [1, *array.shape[1:]] if is_layered(name, len(array.shape)) else list(array.shape)
    part, axis = list(layer), fsdp_axis(name, len(layer))
    if axis is not None:
        parts = min(MOST_PARTS, max(1, math.prod(layer) * array.dtype.itemsize // LEAST_PART_BYTES))
        part[axis] = next(size for size in range(-(-layer[axis] // parts), layer[axis] + 1) if layer[axis] % size == 0)
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, CHECKSUM]
    sharding = {"chunk_shape": part, "codecs": codecs, "index_codecs": codecs}
    metadata = {
        "shape": array.shape,
        "data_type": np.dtype(array.dtype).name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": layer}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    spec = {"driver": "zarr3", "kvstore": _kvstore(directory), "metadata": metadata}
    # Zeros too, since Orbax takes what is not there for lost.
    spec["store_data_equal_to_fill_value"] = True
    return ts.open(spec, create=True, delete_existing=True).result()


def _kvstore(directory: epath.Path) -> Any:
    path = f"{os.fspath(directory)}/"
    return path if is_remote(directory) else {"driver": "file", "path": path}

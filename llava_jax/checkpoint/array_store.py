"""Reads and writes the arrays of Orbax checkpoints layer by layer, with TensorStore.

Orbax reads and writes an array as a whole. A stacked parameter of a large model takes gigabytes, more than the memory
of some machines that convert weights, so imports and exports handle one layer at a time. What is written here is an
ordinary checkpoint: `orbax.checkpoint` loads it on any number of hosts and devices.
"""

import collections
import math
import os
from collections.abc import Iterator
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
# A layer is one file (a shard of Zarr) of up to MAX_CHUNKS chunks, so that devices that split it read only their own,
# but of no smaller ones than MIN_CHUNK_BYTES: many small requests are slow.
MAX_CHUNKS = 64
MIN_CHUNK_BYTES = 2**20
MAX_PENDING_BYTES = 2**29  # of writes that have not reached the disk; a larger array is written by itself
CHECKSUM = {"name": "crc32c"}  # the codec of Zarr that appends a CRC-32C to each chunk and verifies it when it is read


WITHOUT_CHECKSUM = tensorstore_utils._build_zarr3_metadata


def _with_checksum(*args: Any, **options: Any) -> dict[str, Any]:
    """Adds `CHECKSUM` to the codecs of Orbax, whose own checksums cover the indices but not the data."""
    array = WITHOUT_CHECKSUM(*args, **options)
    for sharding in array["codecs"]:
        sharding["configuration"]["codecs"].append(CHECKSUM)
    return array


tensorstore_utils._build_zarr3_metadata = _with_checksum  # Orbax has no option for this


class ArrayWriter:
    """Writes a new Orbax checkpoint in `directory`, which must not exist, layer by layer.

    Use it in a `with` statement, whose end waits for the disk. Raises what TensorStore raises.
    """

    def __init__(self, directory: epath.Path, arrays: dict[str, jax.ShapeDtypeStruct]):
        context = ocp.Context()
        context.array.saving.use_ocdbt = False
        context.array.saving.enable_write_sharding_file = False
        context.array.saving.array_metadata_store = None
        with context:  # writes the tree with scalars, which `_create` replaces by arrays
            ocp.save(directory, {name: jnp.zeros((), array.dtype) for name, array in arrays.items()})
        self._stores = {name: _create(directory / TREE / name, name, array) for name, array in arrays.items()}
        self._left = {name: math.prod(array.shape) for name, array in arrays.items()}
        self._pending = collections.deque()  # writes that have not ended, each with its bytes

    def __enter__(self) -> "ArrayWriter":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        errors = [self._wait() for _ in range(len(self._pending))]  # for all, so that nothing is written afterwards
        if kind is not None:
            return
        for error in filter(None, errors):
            raise error
        if any(self._left.values()):
            raise ValueError(f"not all was written: {', '.join(name for name, left in self._left.items() if left)}")

    def write(self, name: str, layer: int | None, values: np.ndarray) -> None:
        """Writes one layer (index of the first axis) of an array, or all of it. Do not change `values` afterwards."""
        while self._pending and sum(size for _, size in self._pending) + values.nbytes > MAX_PENDING_BYTES:
            if error := self._wait():
                raise error
        store = self._stores[name] if layer is None else self._stores[name][layer]
        if values.dtype != store.dtype.numpy_dtype or values.shape != store.shape:
            raise ValueError(f"{name} is {values.dtype}{values.shape}, not {store.dtype.name}{store.shape}")
        written = store.write(values, can_reference_source_data_indefinitely=True)
        self._pending.append((written, values.nbytes))
        self._left[name] -= values.size

    def _wait(self) -> Exception | None:
        """Waits for the oldest write and returns its error, if it failed."""
        return self._pending.popleft()[0].exception()


def layer_by_layer() -> ocp.Context:
    """A context in which Orbax writes each layer of a stacked array to a file of its own."""

    def options(keypath: tuple, value: Any) -> ocp.options.ArrayOptions.Saving.StorageOptions | None:
        layered = is_layered(jax.tree_util.keystr(keypath), np.ndim(value))
        return ocp.options.ArrayOptions.Saving.StorageOptions(shard_axes=(0,)) if layered else None

    context = ocp.Context()
    context.array.saving.scoped_storage_options_creator = options
    return context


def is_layered(name: str, ndim: int) -> bool:
    """Whether a parameter has a file for each layer: matrices do, the vectors of all layers are in one file."""
    return ".layers." in name and ndim > 2


def open_array(directory: epath.Path, name: str) -> ts.TensorStore:
    """An array of the tree that Orbax keeps in `directory`; `[index].read().result()` reads it."""
    if (directory / "manifest.ocdbt").exists():
        store = {"driver": "ocdbt", "base": _kvstore(directory), "path": f"{name}/"}
    else:
        store = _kvstore(directory / name)
    # A missing chunk is an error, as it is for Orbax, which writes chunks of zeros too.
    spec = {"driver": "zarr3", "kvstore": store, "fill_missing_data_reads": False}
    return ts.open(spec, open=True, read=True).result()


def read_chunks(array: ts.TensorStore) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """An array in the chunks that it is stored in, each as (index, values).

    Chunks fit into memory that was just freed. For a whole layer the system has to allocate new pages, twice, which
    takes longer than the rest of an export.
    """
    shape, chunk = array.shape, array.chunk_layout.read_chunk.shape
    axis = next((axis for axis in range(array.rank) if chunk[axis] < shape[axis]), 0)
    for start in range(0, shape[axis], chunk[axis]):
        index = [slice(None)] * array.rank
        index[axis] = slice(start, min(start + chunk[axis], shape[axis]))
        yield tuple(index), array[tuple(index)].read().result()


def _create(directory: epath.Path, name: str, array: jax.ShapeDtypeStruct) -> ts.TensorStore:
    """An empty array in place of what `directory` holds."""
    layer = [1, *array.shape[1:]] if is_layered(name, len(array.shape)) else list(array.shape)
    chunk, axis = list(layer), fsdp_axis(name, len(layer))
    if axis is not None:
        chunks = min(MAX_CHUNKS, max(1, math.prod(layer) * array.dtype.itemsize // MIN_CHUNK_BYTES))
        smallest = -(-layer[axis] // chunks)
        chunk[axis] = next(size for size in range(smallest, layer[axis] + 1) if layer[axis] % size == 0)
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, CHECKSUM]
    sharding = {"chunk_shape": chunk, "codecs": codecs, "index_codecs": codecs}
    metadata = {
        "shape": array.shape,
        "data_type": np.dtype(array.dtype).name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": layer}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    spec = {"driver": "zarr3", "kvstore": _kvstore(directory), "metadata": metadata}
    # Chunks of zeros too, since Orbax takes a missing chunk for lost.
    spec["store_data_equal_to_fill_value"] = True
    return ts.open(spec, create=True, delete_existing=True).result()


def _kvstore(directory: epath.Path) -> Any:
    path = f"{os.fspath(directory)}/"
    return path if is_remote(directory) else {"driver": "file", "path": path}

"""Writes the tensors of an export to safetensors files, with few of them in memory at a time.

The safetensors library needs all tensors of a file at once. A file is the length of its header (8 bytes), the header
(JSON: type, shape and offsets of each tensor) and the tensors without gaps.
"""

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory

from llava_jax.checkpoint.writing import check_free
from llava_jax.cli import track
from llava_jax.convert.stored_tensor import NAMES, read_ahead
from llava_jax.convert.tensors import INDEX, write_json

MAX_SHARD_BYTES = 5 * 10**9


class Tensor(NamedTuple):
    """A tensor to write, which is computed when `read` is called."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def write_shards(directory: Path, tensors: Sequence[Tensor], max_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes one file, or several of at most `max_bytes` with their index, under the names of `save_pretrained`.

    Raises UserError if the disk has too little room for all of them, before the first is written.
    """
    check_free(directory, sum(tensor.nbytes for tensor in tensors))
    by_name = {tensor.name: tensor for tensor in tensors}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_bytes,
    )
    if split.is_sharded:
        write_json(directory / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    for file, names in split.filename_to_tensors.items():
        # Those of wider types first, so that each is aligned.
        write_file(directory / file, sorted(map(by_name.get, names), key=lambda tensor: -tensor.dtype.itemsize))


def write_file(path: Path, tensors: Sequence[Tensor]) -> None:
    with open(path, "wb") as stream:
        stream.write(_header(tensors))
        reads = (functools.partial(tensor_bytes, tensor) for tensor in tensors)
        for data in track(read_ahead(reads), f"writing {path.name}", len(tensors)):
            stream.write(data)


def tensor_bytes(tensor: Tensor) -> np.ndarray:
    """Reads a tensor, as bytes in the order of a file."""
    array = tensor.read()
    assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype), tensor.name
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _header(tensors: Iterable[Tensor]) -> bytes:
    fields, end = {"__metadata__": {"format": "pt"}}, 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        fields[tensor.name] = {"dtype": NAMES[tensor.dtype.name], "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text

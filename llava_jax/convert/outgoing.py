"""What every export needs: a checkpoint's tensors in PyTorch's shapes, their files, and a directory that appears when
complete."""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory

from llava_jax.checkpoint.format import absolute
from llava_jax.checkpoint.reading import Checkpoint
from llava_jax.checkpoint.writing import check_free, new_directory
from llava_jax.cli import UserError, track
from llava_jax.convert.names import entries_of, to_hf_tensor
from llava_jax.convert.stored_tensor import NAMES, read_ahead, resized
from llava_jax.convert.tensors import INDEX, write_json
from llava_jax.models.hf_names import Entry

PARTS = ("vision", "projector", "newline", "llm", "head")
_ROWS = ("llm.embed_tokens.embedding", "llm.lm_head.kernel")  # have a row for each token
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


@contextlib.contextmanager
def new_export(output: str) -> Iterator[Path]:
    """A directory to fill, which takes its name at the end. Raises UserError if it cannot be written."""
    if "://" in os.fspath(output):
        raise UserError(f"{output}: exports can only be written to a local disk; copy it from there")
    try:
        with new_directory(absolute(output)) as partial:
            yield Path(partial)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error}); nothing is left of it") from error


def tensors_of(
    checkpoint: Checkpoint,
    dtype: str | None,
    name_of: Callable[[str, str], str],  # (part, leaf name) -> the name in the export
    parts: tuple[str, ...] = PARTS,
    rows: int | None = None,  # of embeddings and head; new ones are the mean of the others; by default as stored
) -> Iterator[Tensor]:
    """The tensors of some parts of a model, not read yet, in `dtype` or in their stored types."""
    stored = checkpoint.abstract()
    entries = entries_of(checkpoint.config)
    for part in parts:
        for entry in entries.get(part, ()):
            there = jnp.dtype(dtype or stored[entry.name].dtype)
            shape = entry.hf_shape(stored[entry.name].shape)
            if rows is not None and entry.name in _ROWS:
                shape = (rows, *shape[1:])
            for layer, leaf in enumerate(entry.leaves()):
                read = functools.partial(_read, checkpoint, entry, layer, there, shape)
                yield Tensor(name_of(part, leaf), shape, there, read)


def read_tensor(checkpoint: Checkpoint, entry: Entry, layer: int) -> np.ndarray:
    """Hugging Face's tensor of a parameter, or of one layer of a stacked one, in its stored type."""
    stored = checkpoint.abstract()[entry.name]
    shape, index = (stored.shape, None) if entry.layers is None else (stored.shape[1:], layer)
    return to_hf_tensor(entry, shape, stored.dtype, checkpoint.read_chunks(entry.name, index))


def _read(checkpoint: Checkpoint, entry: Entry, layer: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    tensor = read_tensor(checkpoint, entry, layer)
    return cast(tensor if tensor.shape == shape else resized(tensor, shape[0]), dtype, entry.name)


def cast(tensor: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """The tensor in another type. Raises UserError if a number is too large for it."""
    if tensor.dtype == dtype:
        return tensor
    with np.errstate(over="ignore"):
        cast = tensor.astype(dtype)
    if dtype == np.float16 and (np.isinf(cast) & np.isfinite(tensor)).any():
        raise UserError(f"{name} has values beyond 65504, the largest of float16: use --dtype bfloat16")
    return cast


def common_dtype(checkpoint: Checkpoint) -> str:
    """The type that holds all stored values: transformers loads every tensor in the one type of a config.json."""
    return jnp.result_type(*{leaf.dtype for leaf in checkpoint.abstract().values()}).name


# --------------------------------------------------------------------------------------------------- safetensors files
# The safetensors library needs all tensors of a file at once; here, few are in memory at a time. A file is the length
# of its header (8 bytes), the header (JSON: type, shape and offsets of each tensor) and the tensors without gaps.


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

"""What every export needs: a checkpoint's tensors in PyTorch's shapes, and a directory that appears when complete."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from llava_jax.checkpoint.format import absolute
from llava_jax.checkpoint.reading import Checkpoint
from llava_jax.checkpoint.writing import new_directory
from llava_jax.cli import UserError
from llava_jax.convert.names import entries_of, to_hf_tensor
from llava_jax.convert.shards import Tensor
from llava_jax.convert.stored_tensor import resized
from llava_jax.models.hf_names import Entry

PARTS = ("vision", "projector", "newline", "llm", "head")
_ROWS = ("llm.embed_tokens.embedding", "llm.lm_head.kernel")  # have a row for each token


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
    name_of: Callable[[str, str], str],
    parts: tuple[str, ...] = PARTS,
    rows: int | None = None,
) -> Iterator[Tensor]:
    """The tensors of some parts of a model, not read yet, in `dtype` or in their stored types.

    Args:
      name_of: (part, leaf name) -> the name in the export.
      rows: number of rows of embeddings and head; new ones are the mean of the others. By default as stored.
    """
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

"""A source's tensors by name, read when asked for."""

import collections
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from llava_jax.cli import UserError
from llava_jax.convert.stored_tensor import StoredTensor, read_numbers
from llava_jax.convert.torch_files import open_torch
from llava_jax.incoming import refuse_pointer_file, to_utf8

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# The files of a directory's weights and their indices, of which the first that is there counts.
WHOLE = ((WEIGHTS, INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json"))


class Tensors:
    """The tensors of a source by name, in the types they are stored in."""

    def __init__(self, held: Mapping[str, StoredTensor]):
        self._held = dict(held)

    @property
    def names(self) -> list[str]:
        return list(self._held)

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def __getitem__(self, name: str) -> StoredTensor:
        return self._held[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._held[name].shape

    def dtype(self, name: str) -> str:
        return self._held[name].dtype

    def get(self, name: str) -> np.ndarray:
        return self._held[name].read()


def has_weights(directory: Path) -> bool:
    return any((directory / name).exists() for pair in WHOLE for name in pair)


def open_directory(directory: Path, files: Sequence[tuple[str, str]] = WHOLE) -> Tensors:
    """The weights of a Hugging Face model directory, in one file or in shards with an index.

    Raises UserError where there are none, or where an index and its shards differ.
    """
    for weights, index in files:
        if (directory / weights).exists():
            return open_files([directory / weights])
        if (directory / index).exists():
            return _open_shards(directory / index)
    known = ", ".join(name for pair in files for name in pair)
    raise UserError(f"{directory}: no weights ({known})")


def open_files(files: Iterable[Path]) -> Tensors:
    """The tensors of all these files, of which no two may have the same name."""
    held: dict[str, StoredTensor] = {}
    for path in files:
        refuse_pointer_file(path)
        found = open_torch(path) if path.suffix in (".bin", ".pt", ".pth") else open_safetensors(path)
        twice = sorted(set(held) & set(found))
        if twice:
            raise UserError(f"{path}: holds {', '.join(twice[:3])}, as another file beside it does")
        held |= found
    return Tensors(held)


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Raises UserError where the file is not whole."""
    try:
        with safe_open(path, framework="np"):  # finds all that can be wrong with it
            pass
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; download it again") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); download it again") from None
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length), object_pairs_hook=functools.partial(_unique, path))
    header.pop("__metadata__", None)
    return {name: _stored(path, 8 + length, **fields) for name, fields in header.items()}


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict, which alone would keep the last of two tensors of one name."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = collections.Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise UserError(f"{path}: holds {twice} twice; download it again")
    return found


def _stored(path: Path, start: int, dtype: str, shape: list[int], data_offsets: list[int]) -> StoredTensor:
    read = functools.partial(read_numbers, path, start + data_offsets[0], dtype, tuple(shape))
    return StoredTensor(tuple(shape), dtype, read)


def _open_shards(index: Path) -> Tensors:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index}: no weight_map; download it again")
    files = sorted(set(weight_map.values()))
    lost = [file for file in files if not (index.parent / file).exists()]
    if lost:
        raise UserError(f"{index}: names {', '.join(lost)}, which is not beside it; download it again")
    tensors = open_files(index.parent / file for file in files)
    missing = sorted(set(weight_map) - set(tensors.names))
    if missing:
        raise UserError(f"{index}: the shards lack {', '.join(missing)}; download them again")
    return tensors


def read_json(path: Path) -> dict:
    """A JSON object. Raises UserError naming the file."""
    try:
        values = json.loads(to_utf8(path.read_bytes(), path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object")
    return values


def write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

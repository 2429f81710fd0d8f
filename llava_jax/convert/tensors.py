"""Opens files of weights: the tensors of a source by name, each read when it is needed."""

import functools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError, safe_open

from llava_jax.cli import UserError
from llava_jax.convert.stored_tensor import StoredTensor, Tensors, read_numbers
from llava_jax.convert.torch_files import open_torch
from llava_jax.files.reading import parse_json, read_object, refuse_pointer_file, require_regular

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER = 16 * 2**20  # bytes; 7B models have 100 KB
MAX_NAME = 500  # characters
# File names of a model's weights and of their index; the first one that exists counts.
WEIGHT_FILES = ((WEIGHTS, INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json"))


def has_weights(directory: Path) -> bool:
    return any((directory / name).exists() for pair in WEIGHT_FILES for name in pair)


def open_directory(directory: Path, files: Sequence[tuple[str, str]] = WEIGHT_FILES) -> Tensors:
    """The weights of a directory of transformers, in one file or in shards with an index.

    Raises UserError if there are none, or if the index and its shards differ.
    """
    for weights, index in files:
        if (directory / weights).exists():
            return open_files([directory / weights])
        if (directory / index).exists():
            return _open_shards(directory / index)
    known = ", ".join(name for pair in files for name in pair)
    raise UserError(f"{directory}: no weights ({known})")


def open_files(files: Iterable[Path]) -> Tensors:
    """The tensors of all these files. Raises UserError if two have the same name."""
    held: Tensors = {}
    for path in files:
        require_regular(path)
        refuse_pointer_file(path)
        found = open_torch(path) if path.suffix in (".bin", ".pt", ".pth") else open_safetensors(path)
        twice = sorted(set(held) & set(found))
        if twice:
            raise UserError(f"{path}: holds {', '.join(twice[:3])}, as another file beside it does")
        if name := next((name for name in found if len(name) > MAX_NAME), None):
            raise UserError(f"{path}: calls a tensor {name[:50]!r}...: a name of {len(name)} characters")
        held |= found
    return held


def open_safetensors(path: Path) -> Tensors:
    """The tensors of a safetensors file. Raises UserError if it is damaged."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if MAX_HEADER < length < os.fstat(file.fileno()).st_size:
            raise UserError(f"{path}: its header takes {length >> 20} MiB, more than that of any weights")
        header = file.read(min(length, MAX_HEADER))
    try:
        with safe_open(path, framework="np"):  # checks the file
            pass
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); download it again") from None
    tensors = parse_json(header, f"{path}, its header")
    tensors.pop("__metadata__", None)
    held: Tensors = {}
    for name, fields in tensors.items():
        dtype, shape, offset = fields["dtype"], tuple(fields["shape"]), 8 + length + fields["data_offsets"][0]
        held[name] = StoredTensor(shape, dtype, functools.partial(read_numbers, path, offset, dtype, shape))
    return held


def _open_shards(index: Path) -> Tensors:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index}: no weight_map; download it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_inside(file):
            raise UserError(f"{index}: weight_map: {name} is in {file!r}, which is not a file beside it or below")
    files = sorted(set(weight_map.values()))
    lost = [file for file in files if not os.path.exists(index.parent / file)]
    if lost:
        raise UserError(f"{index}: names {_some(lost)}, which does not exist; download it again")
    tensors = open_files(index.parent / file for file in files)
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise UserError(f"{index}: the shards lack {_some(missing)}; download them again")
    return tensors


def _is_inside(name: str) -> bool:
    """Whether a relative path stays in its folder. Links in the folder may point outside: users make them."""
    path = PurePosixPath(name)
    return "\0" not in name and bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

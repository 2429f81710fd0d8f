"""A source's tensors by name, read when asked for."""

import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401  (numpy and so safetensors learn bfloat16 from it)
import numpy as np
from safetensors import SafetensorError, safe_open

from llava_jax.cli import UserError
from llava_jax.convert.stored_tensor import StoredTensor
from llava_jax.convert.torch_files import open_torch

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# The files of a directory's weights and their indices, of which the first that is there counts.
LAYOUTS = ((WEIGHTS, INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json"))


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


def open_directory(directory: Path) -> Tensors:
    """The weights of a Hugging Face model directory, in one file or in shards with an index.

    Raises UserError where there are none, or where an index and its shards differ.
    """
    for weights, index in LAYOUTS:
        if (directory / weights).exists():
            return open_files([directory / weights])
        if (directory / index).exists():
            return _open_shards(directory / index)
    known = ", ".join(name for pair in LAYOUTS for name in pair)
    raise UserError(f"{directory}: no weights ({known})")


def open_files(files: Iterable[Path]) -> Tensors:
    """The tensors of all these files, of which no two may have the same name."""
    held: dict[str, StoredTensor] = {}
    for path in files:
        found = open_torch(path) if path.suffix in (".bin", ".pt", ".pth") else open_safetensors(path)
        twice = sorted(set(held) & set(found))
        if twice:
            raise UserError(f"{path}: holds {', '.join(twice[:3])}, as another file beside it does")
        held |= found
    return Tensors(held)


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Raises UserError where the file is not whole."""
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            return {
                name: StoredTensor(tuple(part.get_shape()), part.get_dtype(), functools.partial(_read, path, name))
                for name, part in slices.items()
            }
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; download it again") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); download it again") from None


def _read(path: Path, name: str) -> np.ndarray:
    # Opened anew for each tensor: a file that stays mapped into memory stays there, in the end all of it.
    with safe_open(path, framework="np") as file:
        return file.get_tensor(name)


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
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object")
    return values


def write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""Safetensors files: a source's tensors by name, read when asked for, and the shards of an export."""

import json
import os
from pathlib import Path

import ml_dtypes  # noqa: F401  (numpy and so safetensors learn bfloat16 from it)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llava_jax.cli import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9


class Tensors:
    """The tensors of safetensors files as numpy arrays, in the types they are stored in."""

    def __init__(self, files: list[Path]):
        self._files = {}
        for path in files:
            handle = _open(path)
            for name in handle.keys():  # noqa: SIM118 (it is no mapping)
                if name in self._files:
                    raise UserError(f"{path}: holds {name}, as another file beside it does")
                self._files[name] = handle

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As safetensors calls it: `F32`, `BF16`, ..."""
        return self._files[name].get_slice(name).get_dtype()

    def get(self, name: str) -> np.ndarray:
        return self._files[name].get_tensor(name)


def open_directory(directory: Path) -> Tensors:
    """The weights of a Hugging Face model directory, in one file or in shards with an index.

    Raises UserError where there are none, or where an index and its shards differ.
    """
    if (directory / WEIGHTS).exists():
        return Tensors([directory / WEIGHTS])
    if (directory / INDEX).exists():
        return _open_shards(directory)
    if any(directory.glob("*.bin")):
        raise UserError(
            f"{directory}: its weights are .bin files, which only torch reads; save it as safetensors with "
            "transformers' save_pretrained"
        )
    raise UserError(f"{directory}: no weights, neither {WEIGHTS} nor {INDEX}")


def _open_shards(directory: Path) -> Tensors:
    weight_map = read_json(directory / INDEX).get("weight_map", {})
    tensors = Tensors([directory / file for file in sorted(set(weight_map.values()))])
    missing = sorted(set(weight_map) - set(tensors.names))
    if missing:
        raise UserError(f"{directory / INDEX}: the shards lack {', '.join(missing)}; download them again")
    return tensors


def _open(path: Path):
    try:
        return safe_open(path, framework="np")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); download it again") from None


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


class ShardWriter:
    """Writes tensors one after the other to safetensors files of at most `max_bytes`, as `save_pretrained` does.

    Names and index are written by `close`, when the number of shards is known.
    """

    def __init__(self, directory: str | os.PathLike, max_bytes: int = MAX_SHARD_BYTES):
        self._directory = Path(directory)
        self._max_bytes = max_bytes
        self._pending: dict[str, np.ndarray] = {}
        self._shards: list[list[str]] = []  # the names in each shard written
        self._bytes = 0

    def add(self, name: str, tensor: np.ndarray) -> None:
        pending = sum(held.nbytes for held in self._pending.values())
        if self._pending and pending + tensor.nbytes > self._max_bytes:
            self._flush()
        self._pending[name] = tensor
        self._bytes += tensor.nbytes

    def close(self) -> None:
        self._flush()
        total = len(self._shards)
        if total == 1:
            self._partial(0).rename(self._directory / WEIGHTS)
            return
        weight_map = {}
        for i, names in enumerate(self._shards):
            file = f"model-{i + 1:05d}-of-{total:05d}.safetensors"
            self._partial(i).rename(self._directory / file)
            weight_map |= dict.fromkeys(names, file)
        write_json(self._directory / INDEX, {"metadata": {"total_size": self._bytes}, "weight_map": weight_map})

    def _flush(self) -> None:
        path = self._partial(len(self._shards))
        try:
            save_file(self._pending, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise UserError(f"{path}: cannot be written ({error})") from None
        self._shards.append(list(self._pending))
        self._pending = {}

    def _partial(self, shard: int) -> Path:
        return self._directory / f"shard-{shard}.partial"

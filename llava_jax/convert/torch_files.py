"""Tensors in the files of `torch.save`, without torch and without running what a pickle asks to run.

Such a file is an uncompressed zip: `data.pkl` says which tensors there are, `data/0`, `data/1`, ... are their bytes. A
pickle may name any function to be called. Here only those that describe tensors are known, all others are refused.
"""

import collections
import dataclasses
import functools
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llava_jax.cli import UserError
from llava_jax.convert.stored_tensor import NUMBERS, StoredTensor, read_numbers

# torch's storages by their names in pickles -> the type of their numbers, in safetensors' words.
STORAGES = {
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "DoubleStorage": "F64",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
_LOCAL_HEADER = 30  # bytes of a zip's header before an entry's name


class _Storage(NamedTuple):
    """A run of numbers in the file."""

    dtype: str
    entry: str
    length: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A view of a storage; lengths in numbers, not bytes."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def open_torch(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a state dict by name. Raises UserError where the file is damaged, or holds anything else."""
    try:
        with zipfile.ZipFile(path) as archive:
            return _open(archive, path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; download it again") from None
    except UserError:
        raise
    except (zipfile.BadZipFile, KeyError):
        raise UserError(
            f"{path}: not a whole file of torch.save ({_guess(path)}); download it again, or if it is of torch before "
            "1.6, load and save it with a newer one"
        ) from None
    except Exception as error:  # what a damaged pickle raises is of any class
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); download it again") from None


def _open(archive: zipfile.ZipFile, path: Path) -> dict[str, StoredTensor]:
    entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
        raise UserError(f"{path}: written by a big-endian machine: load and save it with torch on another")
    with archive.open(entries["data.pkl"]) as pickled:
        held = _Unpickler(pickled, path).load()
    if not isinstance(held, dict):
        raise UserError(f"{path}: holds a {type(held).__name__}, not tensors by name")
    for name, value in held.items():
        if not isinstance(name, str):
            raise UserError(f"{path}: {name!r} names a tensor, and is no string")
        if not isinstance(value, _Tensor):
            raise UserError(f"{path}: {name!r} is a {type(value).__name__}, not a tensor: no file of weights alone")
    return {name: _stored(path, entries, name, tensor) for name, tensor in held.items()}


class _Unpickler(pickle.Unpickler):
    """Knows dicts, numbers, strings and torch's tensors."""

    def __init__(self, file: Any, path: Path):
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case "collections", "OrderedDict":
                return collections.OrderedDict
            case "torch._utils", "_rebuild_tensor_v2":
                return _rebuild_tensor
            case "torch._utils", "_rebuild_parameter":
                return _rebuild_parameter
            case "torch", _ if name in STORAGES:
                return name
        raise UserError(f"{self._path}: asks to run {module}.{name}, which no weights need: it is not opened")

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, entry, _, length = pid
        return _Storage(STORAGES[kind], f"data/{entry}", length)


def _rebuild_tensor(storage: _Storage, offset: int, shape: tuple, strides: tuple, *_: Any) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(data: _Tensor, *_: Any) -> _Tensor:
    return data


def _stored(path: Path, entries: dict[str, zipfile.ZipInfo], name: str, tensor: _Tensor) -> StoredTensor:
    storage, entry = tensor.storage, entries.get(tensor.storage.entry)
    lengths = (storage.length, tensor.offset, *tensor.shape, *tensor.strides)
    if not all(type(length) is int and length >= 0 for length in lengths):
        raise UserError(f"{path}: damaged, the shape of {name} is {tensor.shape}; download it again")
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    if entry is None or entry.compress_type != zipfile.ZIP_STORED or entry.file_size < _bytes(storage):
        raise UserError(f"{path}: the numbers of {name} are not in it; download it again")
    if math.prod(tensor.shape) and last >= storage.length:
        raise UserError(f"{path}: {name} is larger than what is stored of it; download it again")
    return StoredTensor(tensor.shape, storage.dtype, functools.partial(_read, path, entry.header_offset, tensor))


def _read(path: Path, header_offset: int, tensor: _Tensor) -> np.ndarray:
    storage, size = tensor.storage, NUMBERS[tensor.storage.dtype].itemsize
    with open(path, "rb") as file:
        file.seek(header_offset)
        header = file.read(_LOCAL_HEADER)
    lengths = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")  # name, extra field
    start = header_offset + _LOCAL_HEADER + sum(lengths)
    if _is_contiguous(tensor):
        return read_numbers(path, start + tensor.offset * size, storage.dtype, tensor.shape)
    numbers = read_numbers(path, start, storage.dtype, (storage.length,))
    strides = [stride * size for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(numbers[tensor.offset :], tensor.shape, strides, writeable=False)


def _is_contiguous(tensor: _Tensor) -> bool:
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _bytes(storage: _Storage) -> int:
    return storage.length * NUMBERS[storage.dtype].itemsize


def _guess(path: Path) -> str:
    with open(path, "rb") as file:
        start = file.read(4)
    if start[:2] == b"PK":
        return "it is cut short"
    return "it is no zip"

"""Reads tensors from files of `torch.save`, without torch and without running code of the file.

Such a file is an uncompressed zip: `data.pkl` describes the tensors, `data/0`, `data/1`, ... are their bytes. A pickle
is a program that can call any function, and a short one can take all memory. Here only the instructions that describe
tensors are supported, and only for that; all others are refused. Nothing can become larger than the file.
"""

import collections
import dataclasses
import functools
import io
import math
import os
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from llava_jax.cli import UserError
from llava_jax.convert.stored_tensor import NUMBERS, StoredTensor, read_numbers
from llava_jax.files.reading import require_regular

# Torch's words for the types of `NUMBERS`, in their order; and the names of its storages in pickles -> these types.
_WORDS = ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")
STORAGES = {f"{word}Storage": dtype for word, dtype in zip(_WORDS, NUMBERS, strict=True)}
_STORAGES = {f"torch.{name}": dtype for name, dtype in STORAGES.items()}
_NAMES = {"collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", *_STORAGES}
_LOCAL_HEADER = 30  # bytes of an entry's header in a zip before the name
MAX_TABLE = 2 * 2**20  # bytes of data.pkl, and of the zip's table of contents: enough for 10,000 tensors
MAX_AXES = 8
MAX_LENGTH = 2**48  # of an axis, a stride, an offset

# Pickle's own instructions that describe tensors, or objects that errors name; `_Unpickler` has four more. They are
# those of pickle's Python version, which keeps its memo in a dict and reads no more than the file has.
_INSTRUCTIONS = """
PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BINFLOAT BININT BININT1 BININT2 LONG1 BINUNICODE SHORT_BINUNICODE
BINUNICODE8 EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS GLOBAL STACK_GLOBAL
BINPERSID BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET
"""


class _Storage(NamedTuple):
    """A sequence of numbers in the file."""

    dtype: str
    entry: str
    length: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A view of a storage; lengths are in numbers, not bytes."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Refused(Exception):
    """An error without the name of the file."""


def open_torch(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a state dict by name. Raises UserError if the file is damaged, or holds anything else."""
    require_regular(path)
    try:
        with _File(path) as file, zipfile.ZipFile(file) as archive:
            return _open(archive, path, os.fstat(file.fileno()).st_size)
    except _Refused as error:
        raise UserError(f"{path}: {error}") from None
    except (zipfile.BadZipFile, KeyError):
        wrong = "it is cut short" if _is_zip(path) else "it is no zip"
        raise UserError(
            f"{path}: not a whole file of torch.save ({wrong}); download it again, or if it is of torch before 1.6, "
            "load and save it with a newer one"
        ) from None
    except PermissionError:
        raise
    except Exception as error:  # a damaged pickle raises any class
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); download it again") from None


class _File(io.FileIO):
    """A file that refuses to let zipfile read a large table of contents."""

    def read(self, size: int = -1) -> bytes:
        data = super().read(min(size, MAX_TABLE + 1) if size >= 0 else MAX_TABLE + 1)
        if len(data) > MAX_TABLE:
            raise _Refused(f"its table of contents takes more than {MAX_TABLE >> 20} MiB: no file of weights")
        return data


def _open(archive: zipfile.ZipFile, path: Path, size: int) -> dict[str, StoredTensor]:
    entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    if len(entries) < len(archive.infolist()):
        raise _Refused("holds an entry twice; download it again")
    if sum(max(info.file_size, info.compress_size) for info in entries.values()) > size:
        raise _Refused("its entries are compressed or overlap, which those of torch.save never do: it is not opened")
    if "byteorder" in entries and _content(archive, entries["byteorder"]) != b"little":
        raise _Refused("written by a big-endian machine: load and save it with torch on another")
    held = _Unpickler(io.BytesIO(_content(archive, entries["data.pkl"]))).load()
    if not isinstance(held, dict):
        raise _Refused(f"holds a {type(held).__name__}, not tensors by name")
    for name, value in held.items():
        if not isinstance(name, str):
            raise _Refused(f"{name!r} names a tensor, and is no string")
        if not isinstance(value, _Tensor):
            raise _Refused(f"{name!r} is a {type(value).__name__}, not a tensor: no file of weights alone")
        _check(name, value, entries.get(value.storage.entry))
    if sum(math.prod(tensor.shape) for tensor in held.values()) > size:
        raise _Refused("its tensors have more numbers than it has bytes, since they share them: it is not opened")
    offsets = {name: entries[tensor.storage.entry].header_offset for name, tensor in held.items()}
    return {
        name: StoredTensor(tensor.shape, tensor.storage.dtype, functools.partial(_read, path, offsets[name], tensor))
        for name, tensor in held.items()
    }


def _content(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """The content of an entry that describes the others."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise _Refused("its entries are compressed, which those of torch.save never are: it is not opened")
    if entry.file_size > MAX_TABLE:
        raise _Refused(f"{entry.filename!r} in it takes more than {MAX_TABLE >> 20} MiB: no file of weights alone")
    return archive.read(entry)


class _Instructions(dict):
    """The methods of an unpickler by the code of the instruction; other codes are refused."""

    def __missing__(self, code: int) -> NoReturn:
        known = pickletools.code2op.get(chr(code))
        raise _Refused(
            f"asks for {known.name if known else code} in its pickle, which no weights need: it is not opened"
        )


class _Unpickler(pickle._Unpickler):
    """Reads dicts, numbers, strings and torch's tensors."""

    dispatch = _Instructions(
        {
            code: pickle._Unpickler.dispatch[code]
            for code in (getattr(pickle, name)[0] for name in _INSTRUCTIONS.split())
        }
    )

    def find_class(self, module: str, name: str) -> str:
        """Returns names instead of objects, so that none of them is called."""
        if (found := f"{module}.{name}") in _NAMES:
            return found
        raise _Refused(f"asks to run {found}, which no weights need: it is not opened")

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", str(kind), str(entry), _, int(length)) if kind in _STORAGES:
                return _Storage(_STORAGES[kind], f"data/{entry}", length)
        raise _Refused("damaged, what it names as a storage is none; download it again")

    def load_reduce(self) -> None:
        """Refuses other arguments, since calls with them could compare, hash or copy forever."""
        arguments, name = self.stack.pop(), self.stack.pop()
        match name, arguments:
            case str("collections.OrderedDict"), ():
                self.append(collections.OrderedDict())
            case str("torch._utils._rebuild_tensor_v2"), (_Storage(), int(), tuple(shape), tuple(strides), *_) if (
                len(shape) == len(strides) <= MAX_AXES
            ):
                self.append(_Tensor(*arguments[:4]))
            case str("torch._utils._rebuild_parameter"), (_Tensor() as tensor, *_):
                self.append(tensor)
            case _:
                raise _Refused("damaged, a tensor in it is not described as one; download it again")

    def load_build(self) -> None:
        """Ignores the `_metadata` of a state dict; refuses the instruction for anything else."""
        state = self.stack.pop()
        if type(state) is not dict or type(self.stack[-1]) is not collections.OrderedDict:
            raise _Refused("asks for BUILD in its pickle of what is no state dict: it is not opened")

    def load_setitem(self) -> None:
        self._set([self.stack.pop(), self.stack.pop()][::-1])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list[Any]) -> None:
        held = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):  # hashing nested tuples could take forever
                raise _Refused(f"a {type(key).__name__} names a tensor, and is no string")
            if key in held:
                raise _Refused(f"holds {key!r} twice; download it again")
            held[key] = value

    dispatch |= {
        pickle.REDUCE[0]: load_reduce,
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }


def _check(name: str, tensor: _Tensor, entry: zipfile.ZipInfo | None) -> None:
    """Raises `_Refused` unless the tensor lies in its storage, and the storage in the file."""
    storage = tensor.storage
    lengths = (storage.length, tensor.offset, *tensor.shape, *tensor.strides)
    if not all(type(length) is int and 0 <= length < MAX_LENGTH for length in lengths):
        raise _Refused(f"damaged, {name} has no such shape, strides or offset; download it again")
    stored_bytes = storage.length * NUMBERS[storage.dtype].itemsize
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    if entry is None or entry.compress_type != zipfile.ZIP_STORED or entry.file_size < stored_bytes:
        raise _Refused(f"the numbers of {name} are not in it; download it again")
    if math.prod(tensor.shape) and max(last, math.prod(tensor.shape) - 1) >= storage.length:
        raise _Refused(f"{name} is larger than what is stored of it; download it again")


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


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK"

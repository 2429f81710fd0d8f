"""Checks the header of a GGUF file before transformers reads it.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from llava_jax.cli import UserError, shown

MAX_ENTRIES = 10_000  # tensors, and values
MAX_ITEMS = 4_000_000  # of all arrays together, such as tokens and merges
MAX_TEXT = 2**24  # bytes
MAX_PER_BYTE = 8  # numbers: the smallest types take more than one bit
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _ARRAY = 8, 9


class Header(NamedTuple):
    """What a GGUF file says of itself."""

    values: dict[str, Any]  # by key; of an array, its number of items
    tensors: dict[str, int]  # name -> how many numbers it has

    @property
    def numbers(self) -> int:
        return sum(self.tensors.values())

    def of_model(self, key: str, default: Any = None) -> Any:
        """The value of a key of its architecture."""
        return self.values.get(f"{self.values.get('general.architecture')}.{key}", default)


def read_header(path: Path) -> Header:
    """Raises UserError if the file is damaged, or describes more than it can hold."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path}: neither a directory with a config.json nor a GGUF file")
        try:
            version, tensors, entries = _unpack(file, "<IQQ")
            if version not in (2, 3) or tensors > MAX_ENTRIES or entries > MAX_ENTRIES:
                raise ValueError(f"version {version}, {tensors} tensors, {entries} values")
            values = dict(_values(file, entries))
            header = Header(values, dict(_tensor(file) for _ in range(tensors)))
        except (struct.error, ValueError) as error:
            raise UserError(f"{path}: a damaged GGUF file ({error}); download it again") from None
    blocks, numbers = header.of_model("block_count", 0), header.numbers
    if not isinstance(blocks, int) or blocks > MAX_ENTRIES or numbers > MAX_PER_BYTE * size:
        raise UserError(f"{path}: describes {shown(blocks)} layers and {numbers} numbers, more than {size} bytes hold")
    return header


def _values(file: BinaryIO, entries: int) -> Any:
    """Keys and values; for an array, its number of items."""
    left = MAX_ITEMS
    for _ in range(entries):
        key, (kind,) = _text(file), _unpack(file, "<I")
        if kind != _ARRAY:
            yield key, _text(file) if kind == _TEXT else _unpack(file, _scalar(kind))[0]
            continue
        item, count = _unpack(file, "<IQ")
        left -= count
        if left < 0:
            raise ValueError(f"{key[:80]!r} has {count} items")
        if item != _TEXT:
            file.seek(count * struct.calcsize(_scalar(item)), 1)
        for _ in range(count if item == _TEXT else 0):
            _text(file)
        yield key, count


def _tensor(file: BinaryIO) -> tuple[str, int]:
    """Name and numbers of the next tensor."""
    name, (axes,) = _text(file), _unpack(file, "<I")
    if axes > 4:
        raise ValueError(f"a tensor of {axes} axes")
    *lengths, _, _ = _unpack(file, f"<{axes}QIQ")
    return name, math.prod(lengths)


def _unpack(file: BinaryIO, form: str) -> tuple:
    return struct.unpack(form, file.read(struct.calcsize(form)))


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"a value of type {kind}")
    return _SCALARS[kind]


def _text(file: BinaryIO) -> str:
    (length,) = _unpack(file, "<Q")
    if length > MAX_TEXT:
        raise ValueError(f"a text of {length} bytes")
    return file.read(length).decode(errors="replace")

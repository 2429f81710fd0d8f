"""The header of a GGUF file, looked at before transformers believes it.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from llava_jax.cli import UserError, shown

MAX_ENTRIES, MAX_TENSORS, MAX_ITEMS = 10_000, 10_000, 4_000_000  # items: of all arrays, such as pieces and merges
MAX_TEXT = 2**24  # bytes
MAX_PER_BYTE = 8  # numbers; the smallest types take more than a bit
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _ARRAY = 8, 9


class Header(NamedTuple):
    """What a file says of itself."""

    values: dict[str, Any]  # scalars and texts by their keys; arrays by how many items they have
    numbers: int  # in all tensors


def read_header(path: Path) -> Header:
    """Raises UserError where it is damaged, or describes more than the file can hold."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        try:
            if file.read(4) != b"GGUF":
                raise UserError(f"{path}: neither a directory with a config.json nor a GGUF file")
            header = _read(file, size)
        except (struct.error, UnicodeDecodeError, ValueError) as error:
            raise UserError(f"{path}: a damaged GGUF file ({error}); download it again") from None
    blocks = header.values.get(f"{header.values.get('general.architecture')}.block_count", 0)
    if not isinstance(blocks, int) or blocks > MAX_TENSORS or header.numbers > MAX_PER_BYTE * size:
        raise UserError(
            f"{path}: describes {shown(blocks)} layers and {header.numbers} numbers, more than its {size} bytes hold"
        )
    return header


def _read(file: BinaryIO, size: int) -> Header:
    version, tensors, entries = _unpack(file, "<IQQ")
    if version not in (2, 3) or tensors > MAX_TENSORS or entries > MAX_ENTRIES:
        raise ValueError(f"version {version}, {tensors} tensors, {entries} entries")
    values, left = {}, MAX_ITEMS
    for _ in range(entries):
        key = _text(file)
        (kind,) = _unpack(file, "<I")
        if kind == _ARRAY:
            item, values[key] = _unpack(file, "<IQ")
            left -= values[key]
            if left < 0 or item == _ARRAY:
                raise ValueError(f"{key[:80]!r} has {values[key]} items")
            if item == _TEXT:
                for _ in range(values[key]):
                    _text(file)
            else:
                file.seek(values[key] * struct.calcsize(_scalar(item)), 1)
        else:
            values[key] = _text(file) if kind == _TEXT else _unpack(file, _scalar(kind))[0]
    numbers = 0
    for _ in range(tensors):
        _text(file)
        (axes,) = _unpack(file, "<I")
        if axes > 4:
            raise ValueError(f"a tensor of {axes} axes")
        count = 1
        for length in _unpack(file, f"<{axes}Q"):
            count *= length
        numbers += count
        _, offset = _unpack(file, "<IQ")
        if offset > size:
            raise ValueError("a tensor is not in it")
    return Header(values, numbers)


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

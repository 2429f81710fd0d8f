"""Reads files of unknown origin: checks that they are regular files, decodes their text, and parses JSON within bounds.

A clone without git-lfs has a pointer of three lines in place of each large file. Such a file can be opened and read, so
all code that reads a file of unknown origin checks for it.
"""

import collections
import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any

from etils import epath

from llava_jax.cli import UserError
from llava_jax.remote import is_remote

POINTER = b"version https://git-lfs.github.com/spec/v1"  # the beginning of each
MAX_BYTES = 8 * 2**20  # of a small file, such as a configuration: the default limit
MAX_DEPTH = 100  # of nested lists and objects, so that code may recurse through them
MAX_DIGITS = 300  # of an integer, which then fits into a float; an absent `model_max_length` is stored as 10**30
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # half of a character, mostly followed by the other half


def refuse_pointer(data: bytes, name: str | os.PathLike) -> None:
    """Raises `UserError` if `data`, the beginning of a file, is that of a Git LFS pointer."""
    if data.startswith(POINTER):
        raise UserError(f"{name}: is a Git LFS pointer, not the file itself: run `git lfs pull` where it was cloned")


def refuse_pointer_file(path: Path) -> None:
    """Raises `UserError` if a local file, which need not exist, is a Git LFS pointer."""
    if path.is_file():
        with open(path, "rb") as file:
            refuse_pointer(file.read(len(POINTER)), path)


def refuse_pointers_below(directory: str | os.PathLike) -> None:
    """Raises `UserError` if a local directory holds a Git LFS pointer, which may be why a file cannot be read."""
    if not is_remote(directory):
        for file in Path(directory).rglob("*"):
            refuse_pointer_file(file)


def to_utf8(data: bytes, name: str | os.PathLike) -> bytes:
    """The bytes of a text file in UTF-8 without a byte order mark; UTF-16 and UTF-32 are converted.

    UTF-8 is returned unchecked. Raises `UserError` for Git LFS pointers and broken UTF-16.
    """
    refuse_pointer(data, name)
    encoding = json.detect_encoding(data[:4])  # by the byte order mark or the first four bytes, in JSON ASCII
    if encoding.startswith("utf-8"):
        return data.removeprefix(b"\xef\xbb\xbf")
    try:
        return data.decode(encoding).encode()
    except UnicodeDecodeError as error:
        raise broken(name, encoding, error) from error


def broken(name: str | os.PathLike, encoding: str, error: UnicodeDecodeError) -> UserError:
    return UserError(f"{name}: is no {encoding.upper()}: {error.reason}; convert it to UTF-8: iconv -t utf-8")


def require_regular(path: str | os.PathLike) -> None:
    """Raises `UserError` unless a local path is a regular file or links to one: a FIFO blocks, /dev/zero never ends."""
    if is_remote(path):
        return
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # a loop of links, a name that is too long or holds a NUL
        raise UserError(f"{os.fspath(path)!r}: cannot be opened ({getattr(error, 'strerror', error)})") from None
    refuse_irregular(found, path)


def refuse_irregular(found: os.stat_result, path: str | os.PathLike) -> None:
    """Raises `UserError` unless `found`, the result of `os.stat`, is that of a regular file."""
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a device, pipe or socket"
        way_out = ": write what comes out of it to a file first" if stat.S_ISFIFO(found.st_mode) else ""
        raise UserError(f"{path}: is {kind}, not a file{way_out}")


def read_bytes(path: str | os.PathLike, limit: int = MAX_BYTES) -> bytes:
    """The content of a file, local or remote. Raises `UserError` if it is not a regular file or larger than `limit`."""
    require_regular(path)
    try:
        with epath.Path(path).open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    if len(data) > limit:
        raise UserError(f"{path}: is larger than {limit / 2**20:.4g} MiB, which such a file never is")
    return data


def read_json(path: str | os.PathLike, *, limit: int = MAX_BYTES, strict: bool = True) -> Any:
    """The JSON value in a file, local or remote. Raises `UserError` as `read_bytes` and `parse_json` do."""
    return parse_json(read_bytes(path, limit), path, strict=strict)


def read_object(path: str | os.PathLike, *, strict: bool = True) -> dict[str, Any]:
    """The JSON object in a file. Raises `UserError` as `read_json` does, and if the value is not an object."""
    value = read_json(path, strict=strict)
    if not isinstance(value, dict):
        raise UserError(f"{path}: is not a JSON object")
    return value


def parse_json(data: bytes | str, name: str | os.PathLike, *, strict: bool = True) -> Any:
    """The value of JSON text in any Unicode encoding. Raises `UserError` with `name` if `loads` refuses it."""
    try:
        return loads(to_utf8(data, name) if isinstance(data, bytes) else data, strict=strict)
    except UnicodeDecodeError as error:
        raise broken(name, "utf-8", error) from error
    except ValueError as error:
        raise UserError(f"{name}: is no JSON: {error}") from error


def loads(data: bytes | str, *, strict: bool = True) -> Any:
    """The value of JSON text, in UTF-8 if it is bytes.

    Args:
      data: the text. The caller bounds its size: a value takes up to about 30 bytes of memory for each byte of text.
      strict: whether to refuse what Python accepts beyond the JSON standard: duplicate keys of an object (the last one
        would count), NaN, infinite numbers and lone surrogates (which cannot be written as UTF-8).

    Raises:
      ValueError: the text is not JSON or not UTF-8, is nested more than `MAX_DEPTH` deep, or holds an integer of more
        than `MAX_DIGITS` digits.
    """
    text = data.decode() if isinstance(data, bytes) else data
    try:
        value = (_STRICT if strict else _LENIENT).decode(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _refuse_deep(value)
    if strict and _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode()
    return value


_TOO_DEEP = f"it is nested more than {MAX_DEPTH} deep"


def _refuse_deep(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        children = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list))
        level = [child for some in children for child in some if isinstance(child, dict | list)]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"it holds a number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"it holds {text[:20]}, which is no finite number")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = collections.Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"an object holds {twice[:100]!r} twice")
    return value


# Python's decoder bounds the depth by its own recursion limit.
_LENIENT = json.JSONDecoder(parse_int=_integer)
_STRICT = json.JSONDecoder(parse_int=_integer, parse_float=_finite, parse_constant=_finite, object_pairs_hook=_unique)

"""Files that others wrote: in which encoding their text is, and whether they are here at all.

A clone without git-lfs holds, in place of each large file, a pointer of three lines. It exists and can be read, so
whatever opens a file from outside has to ask.
"""

import json
import os
from pathlib import Path

from llava_jax.cli import UserError

POINTER = b"version https://git-lfs.github.com/spec/v1"  # how each begins


def refuse_pointer(data: bytes, name: str | os.PathLike) -> None:
    """Raises `UserError` where what was read of a file is the beginning of a Git LFS pointer."""
    if data.startswith(POINTER):
        raise UserError(f"{name}: is a Git LFS pointer, not the file itself: run `git lfs pull` where it was cloned")


def refuse_pointer_file(path: Path) -> None:
    """The same of a local file, which need not exist."""
    if path.is_file():
        with open(path, "rb") as file:
            refuse_pointer(file.read(len(POINTER)), path)


def encoding_of(head: bytes) -> str:
    """The Unicode encoding of text, by its byte order mark or its first four bytes, which in JSON are ASCII."""
    return json.detect_encoding(head)


def to_utf8(data: bytes, name: str | os.PathLike) -> bytes:
    """The bytes of a text file in UTF-8 without a byte order mark; UTF-16 and UTF-32 are converted.

    What claims to be UTF-8 is returned unchecked. Raises `UserError` for Git LFS pointers and broken UTF-16.
    """
    refuse_pointer(data, name)
    encoding = encoding_of(data[:4])
    if encoding.startswith("utf-8"):
        return data.removeprefix(b"\xef\xbb\xbf")
    try:
        return data.decode(encoding).encode()
    except UnicodeDecodeError as error:
        raise broken(name, encoding, error) from error


def broken(name: str | os.PathLike, encoding: str, error: UnicodeDecodeError) -> UserError:
    return UserError(f"{name}: is no {encoding.upper()}: {error.reason}; convert it to UTF-8: iconv -t utf-8")

"""Files that are there once they are whole: a crash, a full disk or a second writer leaves the old one or the new."""

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator
from typing import BinaryIO

from etils import epath

from llava_jax.cli import UserError
from llava_jax.remote import is_remote


@contextlib.contextmanager
def whole_file(out: epath.PathLike) -> Iterator[BinaryIO]:
    """A file to write, which takes its name, or the place of another, at the end; if that isn't reached, it is gone.

    A link stays, and what it points to is replaced. A device or a pipe is written directly.
    """
    target = epath.Path(out if is_remote(out) else os.path.realpath(out))
    if not is_remote(target) and os.path.exists(target) and not os.path.isfile(target):
        with _said(out), open(target, "wb") as file:  # or an IsADirectoryError
            yield file
        return
    partial = epath.Path(f"{target}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with _said(out):
            with partial.open("wb") as file:
                yield file
                if not is_remote(target):
                    file.flush()
                    os.fsync(file.fileno())  # before it takes the place of another
            partial.replace(target)
    finally:
        with contextlib.suppress(OSError):
            if partial.exists():
                partial.unlink()


@contextlib.contextmanager
def _said(out: epath.PathLike) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def whole_list(out: epath.PathLike, lines: bool) -> Iterator[Callable[[bytes], None]]:
    """Such a file of JSON values, one a line or in an array; yields what adds the text of one."""
    opening, between, closing = (b"", b"\n", b"\n") if lines else (b"[\n", b",\n", b"\n]\n")
    with whole_file(out) as file:
        separator = opening

        def add(value: bytes) -> None:
            nonlocal separator
            file.write(separator + value)
            separator = between

        yield add
        if separator is opening and not lines:
            file.write(opening)
        if separator is between or not lines:
            file.write(closing)

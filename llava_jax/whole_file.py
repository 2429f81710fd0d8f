"""Files that are there once they are whole."""

import contextlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

from etils import epath

from llava_jax.cli import UserError


@contextlib.contextmanager
def whole_file(out: epath.PathLike) -> Iterator[BinaryIO]:
    """A file to write, which takes its name, or the place of another, at the end; if that isn't reached, it is gone."""
    partial = epath.Path(f"{out}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            if partial.exists():
                partial.unlink()


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

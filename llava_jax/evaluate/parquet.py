"""Rows of Parquet files of benchmarks. Images stay in the file until they are needed, so that memory does not grow with
it."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from llava_jax.cli import UserError, one_line
from llava_jax.data.parquet import Rows, open_file
from llava_jax.evaluate.lines import Line
from llava_jax.files import cache
from llava_jax.files.reading import refuse_pointer_file, require_regular

ROWS = 64  # read at a time, images included
MAX_OPEN = 8  # columns of files that a thread has open
_OPENED = threading.local()


class StoredImage(NamedTuple):
    """An image in a cell of a Parquet file: `place` of those in the cell."""

    path: str
    column: str
    row: int
    place: int
    digest: bytes  # of its bytes

    def read(self) -> bytes:
        """Its bytes. Raises `UserError` if the file can't be read any more."""
        opened, name = _OPENED.__dict__, f"{self.column} {self.path}"
        try:
            if name not in opened:
                if len(opened) >= MAX_OPEN:
                    opened.pop(next(iter(opened)))  # the one that was opened first
                opened[name] = Rows(cache.local_file(self.path), self.column)
            value = opened[name].read(self.row)[self.place]
        except Exception as error:  # pyarrow raises nearly anything on damaged files
            opened.pop(name, None)
            raise UserError(f"{self.path}: row {self.row}: its {self.column} cannot be read: {error}") from error
        return value["bytes"] if isinstance(value, dict) else value


def content(image: bytes | StoredImage) -> bytes:
    return image if isinstance(image, bytes) else image.read()


def row_count(path: str) -> int:
    """The number of rows; of a remote file only its end is read."""
    return _open(path, lambda path: epath.Path(path).open("rb")).metadata.num_rows


def parquet_rows(path: str, leave_out: tuple[str, ...] = ()) -> Iterator[Line]:
    """The rows as objects without nulls, with a `StoredImage` for each bytes value. Raises `UserError` if it is no
    Parquet file.

    Args:
      leave_out: columns that are not read.
    """
    file, number = _open(path), 0
    columns = [name for name in file.schema_arrow.names if name not in leave_out]
    try:
        for batch in file.iter_batches(ROWS, columns=columns):
            for row in batch.to_pylist():
                cells = {name: _stored(path, name, number, cell) for name, cell in row.items() if cell is not None}
                yield Line(f"{path}: row {number}", cells)
                number += 1
    except OSError as error:  # of pyarrow, for damaged pages
        raise UserError(f"{path}: row {number} or a later one cannot be read: {one_line(str(error))}") from error


def _stored(path: str, column: str, row: int, cell: Any, place: int = 0) -> Any:
    """A cell with its bytes replaced: alone, in a list, or as the Hub has images, in an object with `bytes`."""
    if isinstance(cell, bytes):
        return StoredImage(path, column, row, place, hashlib.sha256(cell).digest())
    if isinstance(cell, list):
        return [_stored(path, column, row, part, number) for number, part in enumerate(cell)]
    if isinstance(cell, dict) and isinstance(cell.get("bytes"), bytes):
        return cell | {"bytes": _stored(path, column, row, cell["bytes"], place)}
    return cell


def _open(path: str, local: Callable[[str], Any] = cache.local_file) -> Any:
    require_regular(path)
    refuse_pointer_file(Path(path))
    try:
        return open_file(local(path))
    except UserError:
        raise
    except Exception as error:  # pyarrow raises nearly anything on damaged files
        raise UserError(f"{path}: is no Parquet file: {one_line(str(error))}") from error

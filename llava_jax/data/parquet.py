"""Parquet with images inside, as data sets on the Hub have it: columns `image` or `images`, `conversations`, `id`, ...

The texts of a file are copied to the cache once, as a JSON array: they are read as any other. Images stay in the file.
They are called `FILE/ROW/NUMBER`, and read row by row: memory holds about a row group a thread. A row is found by
reading its row group up to it, unless the thread read an earlier row of that group just before.
"""

import bisect
import itertools
import json
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Union

from etils import epath

from llava_jax.cli import UserError, one_line
from llava_jax.data.image_folder import image_path
from llava_jax.data.images import read_image
from llava_jax.files import cache
from llava_jax.files.reading import refuse_pointer_file, require_regular
from llava_jax.remote import is_remote

if TYPE_CHECKING:
    import pyarrow.parquet as pq

ImageSource = Union[epath.PathLike, "ParquetImages"]  # the folder or the files that image names refer to
IMAGES = ("image", "images")  # columns
ROWS = 256  # texts read at a time


def parquet_files(path: epath.PathLike) -> list[epath.PathLike]:
    """The Parquet files that a path names: itself, or all of a folder by name; none for other files and folders.

    Raises `UserError` if a remote one does not exist.
    """
    if os.fspath(path).endswith(".parquet"):
        if is_remote(path) and not epath.Path(path).is_file():
            raise UserError(f"{path}: no such file")
        return [path]
    if not os.path.isdir(path) and not (is_remote(path) and not os.path.splitext(path)[1]):
        return []
    return sorted(map(os.fspath, epath.Path(path).glob("*.parquet")))


def read_named(images: ImageSource, name: str) -> bytes:
    """The bytes of an image in a folder or in Parquet files. Raises `UserError` naming it."""
    return images.read(name) if isinstance(images, ParquetImages) else read_image(image_path(images, name))


class ParquetImages:
    """The images inside Parquet files, by their names. It is pickled for reading processes."""

    def __init__(self, files: Iterable[epath.PathLike]):
        files = list(files)
        self.files = dict(zip(map(os.path.basename, files), cache.local_files(files), strict=True))
        self._threads = threading.local()

    def read(self, name: str) -> bytes:
        """The bytes of an image. Raises `UserError` naming it."""
        file, row, number = name.rsplit("/", 2)
        rows = self._threads.__dict__
        try:
            if file not in rows:
                rows[file] = Rows(self.files[file])
            images = rows[file].read(int(row))
            data = images[int(number)]
            data = data["bytes"] if isinstance(data, dict) else data
        except Exception as error:  # pyarrow raises nearly anything on damaged files
            rows.pop(file, None)
            raise UserError(f"image {name}: cannot be read: {one_line(f'{type(error).__name__}: {error}')}") from error
        if not data:
            raise UserError(f"image {name}: its row has no bytes: they have to be in the file, not only a path")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.files = state["files"]
        self._threads = threading.local()


class Rows:
    """The images of the rows of a file in a column, of ascending rows without reading anything twice."""

    def __init__(self, path: Path, column: str | None = None):
        self.file = open_file(path)
        self.column = column or image_column(self.file)
        metadata = self.file.metadata
        groups = (metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))
        self.starts = [0, *itertools.accumulate(groups)]
        self.batches: Iterator[Any] = iter(())
        self.group, self.next, self.last = -1, 0, (-1, [])

    def read(self, row: int) -> list[Any]:
        if row == self.last[0]:
            return self.last[1]
        group = bisect.bisect_right(self.starts, row) - 1
        if group != self.group or row < self.next:
            options = {"row_groups": [group], "columns": [self.column], "use_threads": False}
            self.batches = self.file.iter_batches(batch_size=1, **options)
            self.group, self.next = group, self.starts[group]
        batch = next(itertools.islice(self.batches, row - self.next, None))
        self.next = row + 1
        cell = batch.column(0)[0].as_py()
        self.last = (row, cell if isinstance(cell, list) else [cell])
        return self.last[1]


def image_column(file: "pq.ParquetFile") -> str | None:
    """The column that holds images themselves; None if `image` is text, or absent. Raises `UserError` for two."""
    found = sorted({path.split(".")[0] for path, binary in _leaves(file) if binary} & {*IMAGES})
    if len(found) > 1:
        raise UserError(f"has images in both `{found[0]}` and `{found[1]}`: drop one of the columns")
    return found[0] if found else None


def texts(path: epath.PathLike) -> tuple[Path, bool]:
    """The rows of a file without images, as a JSON array in the cache, and whether images are inside.

    Raises `UserError` if it is no Parquet, or is damaged.
    """
    require_regular(path)
    file = cache.local_file(path)
    refuse_pointer_file(file)
    try:
        embedded = image_column(open_file(file)) is not None
        name = os.path.basename(path)
        return cache.derived("parquet", os.path.abspath(file), lambda target: _write(file, name, target)), embedded
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # pyarrow raises nearly anything on damaged files
        detail = one_line(f"{type(error).__name__}: {error}")
        raise UserError(f"{path}: cannot be read as Parquet: {detail}") from error


def _write(path: Path, name: str, target: Path) -> None:
    """Writes the rows of a file to `target`. Instead of the bytes of images they have names."""
    file = open_file(path)
    column, leaves = image_column(file), list(_leaves(file))
    chosen, at_once = [leaf for leaf, binary in leaves if not binary], ROWS
    if column and not any(leaf.split(".")[0] == column for leaf in chosen):  # no paths, which would show how many
        chosen, at_once = chosen + [leaf for leaf, _ in leaves if leaf.split(".")[0] == column], 1
    read = {leaf.split(".")[0] for leaf in chosen}
    unread = {name: "bytes" for name in file.schema_arrow.names if name not in read}  # `samples` judges their keys
    with cache.replacing(target) as out:
        for number, row in enumerate(_rows(file, at_once, chosen)):
            if column:
                cell = row.pop(column)
                cells = cell if isinstance(cell, list) else [] if cell is None else [cell]
                row[column] = [f"{name}/{number}/{place}" for place in range(len(cells))]
            out.write(b",\n" if number else b"[")
            out.write(json.dumps(row | unread, default=str).encode())
        out.write(b"]" if file.metadata.num_rows else b"[]")


def _rows(file: "pq.ParquetFile", at_once: int, leaves: list[str]) -> Iterator[dict[str, Any]]:
    try:
        for batch in file.iter_batches(at_once, columns=leaves):
            yield from batch.to_pylist()
    except OSError as error:  # of pyarrow, for damaged pages: the cache would take it for one of its own files
        raise UserError(f"cannot be read as Parquet: {one_line(str(error))}") from error


def _leaves(file: "pq.ParquetFile") -> Iterator[tuple[str, bool]]:
    """The path of each leaf of the columns, and whether it holds bytes that are no text."""
    for number in range(len(file.schema)):
        leaf = file.schema.column(number)
        text = leaf.logical_type.type in ("STRING", "JSON", "ENUM", "DECIMAL", "UUID")
        yield leaf.path, leaf.physical_type == "BYTE_ARRAY" and not text


def open_file(path: Path | IO[bytes]) -> "pq.ParquetFile":
    import pyarrow.parquet as pq  # takes a third of a second

    return pq.ParquetFile(path, memory_map=True, pre_buffer=False)

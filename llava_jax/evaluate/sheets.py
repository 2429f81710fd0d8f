"""Tables (TSV and Excel's XLSX) whose first row names the columns, as MMBench and VLMEvalKit write them."""

import csv
import datetime
import io
import itertools
import re
import sys
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from etils import epath

from llava_jax.cli import UserError, short, warn
from llava_jax.evaluate.lines import Line, read_text
from llava_jax.evaluate.lines import read_bytes as read_utf8
from llava_jax.files.reading import read_bytes, refuse_pointer

SUFFIXES = (".tsv", ".xlsx")
MAX_BYTES = 256 * 2**20  # of an XLSX, also once it is unpacked
MAX_TEXT = 32_767  # characters of a cell
MAX_CELLS = 5_000_000  # of an XLSX, in which a cell may claim any row and column
_NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def is_sheet(path: epath.PathLike) -> bool:
    """Whether a file is a table, by its name."""
    return epath.Path(path).suffix.lower() in SUFFIXES


def read_sheet(path: epath.PathLike) -> list[Line]:
    """The rows as objects of texts by column; an empty cell of XLSX is None. Only the first sheet of XLSX is read.

    Raises `UserError` if a row has more cells than columns, if two columns have the same name, or if openpyxl is not
    installed.
    """
    rows = _xlsx(path) if epath.Path(path).suffix.lower() == ".xlsx" else _tsv(path)
    where, names = next(rows, ("", ()))
    names = [str(name or "") for name in names]
    if twice := next((name for i, name in enumerate(names) if name and name in names[:i]), None):
        raise UserError(f"{where}: names column {twice} twice")
    return list(_objects(names, rows))


def _objects(names: Sequence[str], rows: Iterable[tuple[str, Sequence[Any]]]) -> Iterator[Line]:
    for where, cells in rows:
        if any(cell not in (None, "") for cell in cells[len(names) :]):
            raise UserError(f"{where}: has {len(cells)} cells, but the first row names {len(names)} columns")
        padded = [*cells, *[None] * (len(names) - len(cells))]
        if any(cell is not None for cell in padded):
            yield Line(where, {name: cell for name, cell in zip(names, padded, strict=False) if name})


def _tsv(path: epath.PathLike) -> Iterator[tuple[str, list[str]]]:
    csv.field_size_limit(sys.maxsize)  # images are among the fields
    lines = io.TextIOWrapper(io.BytesIO(read_utf8(path)), "utf-8", newline="")  # StringIO would take four times as much
    reader = csv.reader(lines, delimiter="\t")
    try:
        yield from ((f"{path}: line {reader.line_num}", row) for row in reader if row)
    except UnicodeDecodeError:
        read_text(path)  # raises an error with the line


def _xlsx(path: epath.PathLike) -> Iterator[tuple[str, Sequence[str | None]]]:
    try:
        from openpyxl import load_workbook
    except ImportError as error:
        raise UserError(f"{path}: reading Excel files needs: pip install 'llava_jax[evaluate]'") from error
    data = read_bytes(path, MAX_BYTES)
    refuse_pointer(data, path)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(part.file_size for part in archive.infolist()) > MAX_BYTES:
                raise ValueError(f"it is larger than {MAX_BYTES >> 20} MiB once it is unpacked")
        with warnings.catch_warnings(action="ignore"):  # about styles and the like
            rows, others = _cells(load_workbook(io.BytesIO(data), read_only=True))
            if any(isinstance(cell, str) and cell.startswith("=") for row in rows for cell in row):
                # A formula has a value that Excel computed; an answer such as "=5" is no formula and has none.
                computed, _ = _cells(load_workbook(io.BytesIO(data), read_only=True, data_only=True))
                rows = [[a if b is None else b for a, b in zip(*pair, strict=False)]
                        for pair in zip(rows, computed, strict=True)]  # fmt: skip
    except Exception as error:  # openpyxl, zipfile and XML raise many kinds of errors for damaged files
        raise UserError(f"{path}: is no Excel file (XLSX): {error}") from error
    if others:
        warn(f"{path}: its first sheet is read; the others ({', '.join(others)}) are not")
    numbered = ((f"{path}: row {number}", row) for number, row in enumerate(rows, 1))
    numbered = itertools.dropwhile(lambda item: not any(item[1]), numbered)  # empty rows above the names
    return ((where, [_text(cell, where) for cell in row]) for where, row in numbered)


def xlsx(rows: Iterable[Sequence[Any]]) -> bytes:
    """An Excel file of one sheet. Texts stay texts, even if they look like formulas; characters that XML does not have
    are left out. Raises `UserError` for a text that is longer than a cell."""
    try:
        import openpyxl
        from openpyxl.cell import WriteOnlyCell
    except ImportError as error:
        raise UserError("writing Excel files needs: pip install 'llava_jax[evaluate]'") from error
    rows = [[_NO_XML.sub("", value) if isinstance(value, str) else value for value in row] for row in rows]
    for number, row in enumerate(rows, 1):
        if long := next((value for value in row if isinstance(value, str) and len(value) > MAX_TEXT), None):
            raise UserError(  # openpyxl would truncate it
                f"row {number}: {short(long)!r} has {len(long):,} characters, but a cell of Excel holds {MAX_TEXT:,}"
            )
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet()

    def cell(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        made = WriteOnlyCell(sheet, value)
        made.data_type = "s"
        return made

    for row in rows:
        sheet.append([cell(value) for value in row])
    content = io.BytesIO()
    book.save(content)
    return content.getvalue()


def _cells(book: Any) -> tuple[list[tuple[Any, ...]], list[str]]:
    """The values of the first sheet of an openpyxl workbook, and the names of further sheets."""
    first, *others = book.worksheets
    first.reset_dimensions()  # programs write wrong ones
    return list(_rows(first)), [sheet.title for sheet in others if any(map(any, _rows(sheet)))]


def _rows(sheet: Any) -> Iterator[tuple[Any, ...]]:
    """The values of the rows. Raises `ValueError` if there are too many."""
    cells = 0
    for row in sheet.iter_rows(values_only=True):
        cells += 1 + len(row)
        if cells > MAX_CELLS:
            raise ValueError(f"it has more than {MAX_CELLS:,} cells")
        yield row


def _text(cell: Any, where: str) -> str | None:
    """A cell as a text, as in TSV. Raises `UserError` for a date, to which Excel converts texts like 1/2."""
    if cell is None or isinstance(cell, str):
        return cell or None
    if isinstance(cell, datetime.date | datetime.time):
        raise UserError(f"{where}: has a date ({cell}), which Excel may have made of another text: format it as text")
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)

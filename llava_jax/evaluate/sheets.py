"""Tables whose first row names the columns, as MMBench and VLMEvalKit write them: TSV, and Excel's XLSX."""

import csv
import io
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from etils import epath

from llava_jax.cli import UserError
from llava_jax.evaluate.lines import Line, read_text
from llava_jax.incoming import refuse_pointer

SUFFIXES = (".tsv", ".xlsx")


def is_sheet(path: epath.PathLike) -> bool:
    """Whether a file's name says that it is such a table."""
    return epath.Path(path).suffix.lower() in SUFFIXES


def read_sheet(path: epath.PathLike) -> list[Line]:
    """The rows as objects of texts by column; None where a cell of XLSX is empty. Of XLSX the first sheet is read.

    Raises `UserError` where a row has more cells than there are columns, or what reads XLSX is not installed.
    """
    rows = _xlsx(path) if epath.Path(path).suffix.lower() == ".xlsx" else _tsv(path)
    _, names = next(rows, ("", ()))
    return list(_objects([str(name or "") for name in names], rows))


def _objects(names: Sequence[str], rows: Iterable[tuple[str, Sequence[Any]]]) -> Iterator[Line]:
    for where, cells in rows:
        if any(cell not in (None, "") for cell in cells[len(names) :]):
            raise UserError(f"{where}: has {len(cells)} cells, but the first row names {len(names)} columns")
        padded = [*cells, *[None] * (len(names) - len(cells))]
        if any(cell is not None for cell in padded):
            yield Line(where, {name: cell for name, cell in zip(names, padded, strict=False) if name})


def _tsv(path: epath.PathLike) -> Iterator[tuple[str, list[str]]]:
    csv.field_size_limit(sys.maxsize)  # images are among the fields
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter="\t")
    return ((f"{path}: line {reader.line_num}", row) for row in reader if row)


def _xlsx(path: epath.PathLike) -> Iterator[tuple[str, list[str | None]]]:
    try:
        import openpyxl
    except ImportError as error:
        raise UserError(f"{path}: reading Excel files needs: pip install 'llava_jax[evaluate]'") from error
    data = epath.Path(path).read_bytes()
    refuse_pointer(data, path)
    try:
        with warnings.catch_warnings(action="ignore"):  # about styles and the like
            book = openpyxl.load_workbook(io.BytesIO(data), read_only=True)
            sheet = book.worksheets[0]
            sheet.reset_dimensions()  # what programs write there may be wrong
            rows = [[_text(cell) for cell in row] for row in sheet.iter_rows(values_only=True)]
    except Exception as error:  # damaged files raise whatever their part of openpyxl, zip or XML does
        raise UserError(f"{path}: is no Excel file (XLSX): {error}") from error
    return ((f"{path}: row {number}", row) for number, row in enumerate(rows, 1))


def _text(cell: Any) -> str | None:
    """A cell as the text that a TSV would have."""
    if cell is None or isinstance(cell, str):
        return cell or None
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)

"""Rows of the toolkits' own files: VLMEvalKit's tables, which are its predictions, too, and the Hub's Parquet, to whose
rows lmms-eval's logs of samples refer."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from llava_jax.cli import UserError, short
from llava_jax.evaluate import dataset_files as files
from llava_jax.evaluate.answers import question_id
from llava_jax.evaluate.label_formats import LABEL_FORMATS, LabelFormat, Labels
from llava_jax.evaluate.lines import Line
from llava_jax.evaluate.sheets import is_sheet

Of = TypeVar("Of")


class Row(NamedTuple):
    """A row with its labels, of which POPE's have one for each sampling."""

    id: str
    labels: tuple[Any, ...]
    right: Collection[str]  # answers
    number: int  # in its file or shards


def add_rows(benchmark: str, labels: Callable[[Line], tuple[Sequence[Any], Collection[str]]]) -> None:
    """Adds the format of a benchmark's labels in such files. `labels` gives those of a row, and the right answers."""

    def read(path: str) -> list[Row]:
        found = [(number, line, *labels(line)) for number, line in files.numbered(path, images=False)]
        return [Row(str(files.first(line.value, *files.IDS) or number), tuple(some), right, number)
                for number, line, some, right in found]  # fmt: skip

    LABEL_FORMATS.add(LabelFormat(
        f"{benchmark}-rows", "VLMEvalKit's TSV, the Hub's Parquet", (benchmark,), read,
        matches=lambda path: is_sheet(path) or str(path).endswith(".parquet"),
    ))  # fmt: skip


def labels_of(rows: Sequence[Row]) -> Labels:
    """The labels by ids, or by place where these repeat. An answer counts for all labels of its row."""
    distinct = len({row.id for row in rows}) == len(rows)
    names = [row.id if distinct else f"row {place}" for place, row in enumerate(rows)]
    named = {row.number: (row, name) for row, name in zip(rows, names, strict=True)}
    keys = [
        (name, place, label) for row, name in zip(rows, names, strict=True) for place, label in enumerate(row.labels)
    ]
    again = {f"{name} ({place + 1})": name for name, place, _ in keys if place}

    def key(line: Line) -> str:
        if "doc_id" in line.value and not (distinct and any(name in line.value for name in files.IDS)):
            known = named if len(named) == len(rows) else {}  # several files number their rows anew
            return row_of(line, known, lambda found: found[0].right, str(line.value.get("target") or ""))[1]
        return question_id(line)

    return Labels({f"{name} ({place + 1})" if place else name: label for name, place, label in keys}, key, again)


def row_of(line: Line, rows: Mapping[int, Of], right: Callable[[Of], Collection[str]], target: str) -> Of:
    """The row of an answer of lmms-eval's log, which has the row's number, and `target`, the right answer. Raises
    `UserError` if there is no such row, or if it has another right answer."""
    number = str(line.value["doc_id"])
    if not number.isdecimal():
        raise UserError(f"{line.where}: doc_id {short(number)} is no number of a row")
    if (row := rows.get(int(number))) is None:
        raise UserError(f"{line.where}: doc_id {number}: the labels have no such row")
    if target and right(row) and target.strip() not in right(row):
        raise UserError(
            f"{line.where}: doc_id {number} has the right answer {short(target)!r}, but that row of the labels has "
            f"{short(next(iter(right(row))))!r}: they are of another version or in another order"
        )
    return row

"""Rows of the toolkits' own files: VLMEvalKit's tables, which are its predictions, too, and the Hub's Parquet, to whose
rows lmms-eval's logs of samples refer."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from llava_jax.cli import UserError, short
from llava_jax.evaluate import dataset_files as files
from llava_jax.evaluate.answers import IDS, question_id
from llava_jax.evaluate.label_formats import LABEL_FORMATS, LabelFormat, Labels
from llava_jax.evaluate.lines import Line, once
from llava_jax.evaluate.sheets import is_sheet


class Row(NamedTuple):
    """A row with its labels, of which POPE's may have one for each sampling."""

    id: str
    labels: tuple[Any, ...]
    right: Collection[str]  # answers in the row, by which logs are checked
    number: int  # in its file or shards
    kind: str = ""  # tells rows with the same id apart
    where: str = ""


OfRow = Callable[[Line], tuple[Sequence[Any], Collection[str], str]]  # to the labels, right answers and kind of a row


def add_rows(benchmark: str, read: OfRow) -> None:
    """Adds the format of a benchmark's labels in such files."""

    def rows(path: str) -> Iterator[Row]:
        for number, line in files.numbered(path, images=False):
            labels, right, kind = read(line)
            yield Row(
                str(files.first(line.value, *files.IDS) or number), tuple(labels), right, number, kind, line.where
            )

    LABEL_FORMATS.add(LabelFormat(
        f"{benchmark}-rows", "VLMEvalKit's TSV, the Hub's Parquet", (benchmark,), rows,
        matches=lambda path: is_sheet(path) or str(path).endswith(".parquet"),
    ))  # fmt: skip


def target_of(line: Line) -> str:
    """The right answer in a line of lmms-eval's log."""
    return str(line.value.get("target") or "")


def labels_of(
    rows: Sequence[Row],
    answer_id: Callable[[Line], str] = question_id,
    target: Callable[[Line], str] = target_of,
    sets: Collection[str] = (),
) -> Labels:
    """The labels by id, those of rows with the same id also by kind, which is the `category` of an answer. A line of
    lmms-eval's log that tells neither belongs to the row with its number, of which `target` is a right answer.

    `sets` are all kinds that rows of a benchmark may have: answers of another one than the labels' are refused.
    """
    kinds: dict[str, set[str]] = {}
    for row in rows:
        kinds.setdefault(row.id, set()).add(row.kind)
    by_number = {row.number: row for row in rows}
    if len(by_number) < len(rows):  # of several files
        by_number = {}

    def name(ident: str, kind: str) -> str:
        return ident if len(kinds.get(ident, ())) < 2 else f"{kind} {ident}"

    def key(line: Line) -> str:
        in_log, named = "doc_id" in line.value, any(field in line.value for field in IDS)
        if in_log and not named:
            return name(*_numbered(line, by_number, target(line)))
        ident, kind = answer_id(line), str(line.value.get("category", ""))
        known = kinds.get(ident, set())
        if kind in sets and known and kind not in known:
            own = " or ".join(sorted(filter(None, known))) or "all sets together"
            raise UserError(
                f"{line.where}: question {ident} is of {kind}, and the labels of {own}: give those of that set"
            )
        if len(known) < 2 or kind in known:
            return name(ident, kind)
        if in_log and by_number:
            return name(*_numbered(line, by_number, target(line)))
        raise UserError(
            f"{line.where}: question {ident} may be of {' or '.join(sorted(known))}: give the labels of one of them"
        )

    first = once(((name(row.id, row.kind), row.labels, row.where) for row in rows),
                 "question {key} has another label before")  # fmt: skip
    keys = [(key, place, label) for key, (labels, _) in first.items() for place, label in enumerate(labels)]
    again = {f"{key} ({place + 1})": key for key, place, _ in keys if place}
    return Labels({f"{key} ({place + 1})" if place else key: label for key, place, label in keys}, key, again)


def _numbered(line: Line, rows: Mapping[int, Row], target: str) -> tuple[str, str]:
    """The id and the kind of the row that a line of lmms-eval's log names. Raises `UserError` if there is no such row,
    or if it has another right answer."""
    number = str(line.value["doc_id"])
    if not number.isdecimal():
        raise UserError(f"{line.where}: doc_id {short(number)} is no number of a row")
    if not rows:
        raise UserError(f"{line.where}: doc_id {number} may be of several files of labels: give one of them")
    if (row := rows.get(int(number))) is None:
        raise UserError(f"{line.where}: doc_id {number}: the labels have no such row")
    if target and row.right and target.strip() not in row.right:
        raise UserError(
            f"{line.where}: doc_id {number} has the right answer {short(target)!r}, but that row of the labels has "
            f"{short(next(iter(row.right)))!r}: they are of another version or in another order"
        )
    return row.id, row.kind

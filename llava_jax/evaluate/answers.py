"""Answers to the questions of a benchmark, as files by anybody have them, and their join with what is right.

A file is JSONL with an object an answer (`question_id` and `text`, or what benchmarks' own results call them), a JSON
array of such objects, one object `{question id: answer}`, or a table (TSV, XLSX) of `index` and `prediction`.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from etils import epath

from llava_jax.cli import UserError, warn
from llava_jax.evaluate.lines import Line, once, read_bytes, read_lines, read_text
from llava_jax.evaluate.sheets import is_sheet, read_sheet
from llava_jax.files.reading import loads, parse_json
from llava_jax.llm_api.thinking import after_thinking, says_nothing

Read = TypeVar("Read")
IDS = ("question_id", "questionId", "id", "index", "image")
TEXTS = ("text", "prediction", "response", "answer")  # the last one, as `answer` beside others is what is right


EMPTY, CUT_OFF = "empty", "cut_off"  # why there is no answer, as it is counted beside a score
API_FAILED = "Failed to obtain answer via API"  # what VLMEvalKit writes in place of an answer


class Answer(NamedTuple):
    value: Any  # text without its thinking, an option's index, or a grade
    where: str  # file and line, for errors
    absent: str = ""  # why there is no answer, which counts as a wrong one in every benchmark; empty where there is one

    @classmethod
    def of(cls, value: Any, where: str) -> "Answer":
        """An answer as it stands in a file, where null, or the NaN of tables, is none."""
        if value is None or value != value:
            return cls(None, where, EMPTY)
        if not isinstance(value, str):
            return cls(value, where)
        final = after_thinking(value)
        if final is None:
            return cls(None, where, CUT_OFF)
        return cls(final, where, EMPTY if says_nothing(final) or final.startswith(API_FAILED) else "")

    @property
    def text(self) -> str | None:
        """None where there is no answer. Raises `UserError` where it is no text."""
        if self.absent:
            return None
        if not isinstance(self.value, str):
            raise UserError(f"{self.where}: the answer is no text but {json.dumps(self.value)[:40]}")
        return self.value

    def read(self, reader: Callable[[str], Read], absent: Read) -> Read:
        """What `reader` makes of the text; `absent` where there is none."""
        return absent if self.text is None else reader(self.text)


def question_id(line: Line) -> str:
    """What tells questions apart in most benchmarks."""
    return line.text(*IDS)


def read_answers(path: epath.PathLike, partial: bool = False) -> dict[str, Answer]:
    """The answers of a file by question id. Raises `UserError` at what is no answer, and at another to a question.

    `partial` leaves out a last line that is cut off.
    """
    return by_key(answer_lines(path, partial), question_id)


def answer_lines(path: epath.PathLike, partial: bool = False) -> list[Line]:
    """A file's answers as objects, with `question_id` and `text` where it has but one object of all."""
    if is_sheet(path):
        return [_of_row(line) for line in read_sheet(path)]
    if epath.Path(path).suffix.lower() in (".xls", ".csv"):
        raise UserError(f"{path}: save the table as XLSX or TSV, which are read")
    if is_lines(path):
        return read_lines(path, partial)
    whole = read_json(path)
    if isinstance(whole, dict):
        return [Line(f"{path}: question {i}", {"question_id": i, "text": value}) for i, value in whole.items()]
    return _elements(whole, path)


def refuse_questions(lines: Sequence[Line], suffix: str = "") -> None:
    """Raises `UserError` where all lines are questions: files of these have a `text`, too.

    Args:
      suffix: what questions of the benchmark end with, if not with a question mark.
    """

    def asks(line: dict[str, Any]) -> bool:
        text, ends = line.get("text"), ("?", suffix) if suffix else ("?",)
        return isinstance(text, str) and text.endswith(ends) and "image" in line and "prompt" not in line

    if lines and all(asks(line.value) for line in lines):
        raise UserError(f"{lines[0].where}: is a question, not an answer: --answers takes what `predict` wrote")


def by_key(lines: Sequence[Line], key: Callable[[Line], str], names: Sequence[str] = TEXTS) -> dict[str, Answer]:
    """Answers, which are the first of these fields, by key. Raises `UserError` at another answer of a key."""
    items = ((key(line), answer_of(line, names)._replace(where=""), line.where) for line in lines)
    found = once(items, "question {key} was answered in {first} already, and otherwise")
    return {ident: answer._replace(where=where) for ident, (answer, where) in found.items()}


def _of_row(line: Line) -> Line:
    """A row of a table, whose `answer` is what is right. An empty cell is an empty text, as it is in TSV."""
    values = {name: value or "" for name, value in line.value.items() if name not in ("answer", "index", "image")}
    if not any(name in values for name in TEXTS):
        raise UserError(f"{line.where}: has no column `prediction`: is it the table of questions?")
    return Line(line.where, {"question_id": line.get(*IDS)} | values)


def answer_of(line: Line, names: Sequence[str] = TEXTS) -> Answer:
    """The first of these fields. There is no answer where that is a grade of a text that answers nothing, or that text,
    or where the line says so."""
    answer = Answer.of(line.get(*names), line.where)
    texts = [Answer.of(line.value[name], line.where) for name in TEXTS if name in line.value]
    metadata = line.value.get("metadata")
    if why := metadata.get("no_answer") if isinstance(metadata, dict) else None:
        return answer._replace(absent=CUT_OFF if str(why).startswith((CUT_OFF, "cut off")) else EMPTY)
    return answer._replace(absent=texts[0].absent if texts else "")


def count_absent(answers: Iterable[Answer]) -> dict[str, int]:
    """How many answers are `empty`, and how many were `cut_off`; nothing of what there is none of."""
    return dict(Counter(answer.absent for answer in answers if answer.absent))


def _elements(values: Any, path: epath.PathLike) -> list[Line]:
    if not isinstance(values, list):
        raise UserError(f"{path}: holds neither objects one a line, nor an array of them, nor one of answers by id")
    for number, value in enumerate(values):
        if not isinstance(value, dict):
            raise UserError(f"{path}: element {number} is no object")
    return [Line(f"{path}: element {number}", value) for number, value in enumerate(values)]


def is_lines(path: epath.PathLike) -> bool:
    """Whether a file has an object a line: its first line is one, and either tells its id or is not the only line."""
    first, _, rest = read_bytes(path).lstrip().partition(b"\n")
    try:
        value = loads(first, strict=False)
    except ValueError:
        return False
    return isinstance(value, dict) and (bool(rest.strip()) or any(name in value for name in IDS))


def read_json(path: epath.PathLike) -> Any:
    """The value in a file. Raises `UserError` where it is no JSON, and for a key that is there twice."""
    return parse_json(read_text(path), path)


def entries_by_id(path: str, hint: str) -> list[tuple[str, str, Any]]:
    """Of a file that is one object of questions by id: where each stands, its id, and what it is.

    Raises `UserError`, which ends with `hint`, where it is none.
    """
    entries = read_json(path)
    if not isinstance(entries, dict):
        raise UserError(f"{path}: is no object of questions by id{hint}")
    return [(f"{path}: question {ident}", ident, entry) for ident, entry in entries.items()]


class Joined(NamedTuple):
    """What was answered and what is right."""

    pairs: list[tuple[Answer, Any]]
    incomplete: dict[str, int]  # how many questions have no answer (`missing`), and answers no question (`unknown`)


def check_asked(answers: Mapping[str, Answer], asked: Collection[str], own: epath.PathLike) -> None:
    """Raises `UserError` where an answer is to none of the questions of a benchmark's file; warns of those without."""
    unknown = [ident for ident in answers if ident not in asked]
    if unknown:
        where, more = answers[unknown[0]].where, f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise UserError(f"{where}: {own} has no question {unknown[0]}{more}: are the answers to another benchmark?")
    missing = [ident for ident in asked if ident not in answers]
    if missing:
        warn(f"{len(missing)} of {len(asked)} questions of {own} have no answer, {missing[0]} the first")


PARTIAL = "--partial scores what is there"
WHOLE = "all have to be answered, and no others"  # for what cannot be done in part


def join(
    answers: Mapping[str, Answer], labels: Mapping[str, Any], path: epath.PathLike, partial: bool, advice: str = PARTIAL
) -> Joined:
    """Answers with their labels, in the order of these.

    Raises `UserError` for answers to what has no label and for labels without an answer, unless `partial`, which warns.
    """
    unknown = [ident for ident in answers if ident not in labels]
    missing = [ident for ident in labels if ident not in answers]
    messages = []
    if unknown:
        where, more = answers[unknown[0]].where, f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        messages.append(
            f"{where}: question {unknown[0]}{more} has none of the {len(labels)} labels: are they of another version?"
        )
    if missing:
        messages.append(f"{path}: has no answer to {len(missing)} of {len(labels)} questions, {missing[0]} the first")
    for message in messages:
        if not partial:
            raise UserError(f"{message}; {advice}")
        warn(message)
    pairs = [(answers[ident], label) for ident, label in labels.items() if ident in answers]
    if not pairs:
        raise UserError(f"{path}: holds no answer to any of {len(labels)} questions")
    counts = {"missing": len(missing), "unknown": len(unknown)}
    return Joined(pairs, {name: count for name, count in counts.items() if count})


def percent(part: float, whole: float) -> float | None:
    """Two decimals; None of nothing."""
    return round(part / whole * 100, 2) if whole else None


def percent_by(values: Iterable[tuple[str, float]]) -> dict[str, float | None]:
    """The mean of each group's values in percent, of (group, value from 0 to 1), in the order of the groups."""
    groups: dict[str, list[float]] = defaultdict(list)
    for group, value in values:
        groups[group].append(value)
    return {group: percent(sum(some), len(some)) for group, some in groups.items()}

"""Answers in files of several formats, and their join with labels.

A file is JSONL with an object for each answer (`question_id` and `text`, or other names of these fields), a JSON array
of such objects, one object `{question id: answer}`, or a table (TSV, XLSX, Parquet) with the columns `index` and
`prediction`. These are the forms of the original, of VLMEvalKit and of benchmarks' own scripts; logs of lmms-eval are
read, too.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from etils import epath

from llava_jax.cli import UserError, warn
from llava_jax.evaluate.lines import Line, once, read_bytes, read_lines, read_text
from llava_jax.evaluate.parquet import parquet_rows
from llava_jax.evaluate.sheets import is_sheet, read_sheet
from llava_jax.files.reading import loads, parse_json
from llava_jax.llm_api.thinking import after_thinking, says_nothing

Read = TypeVar("Read")
IDS = ("question_id", "questionId", "id", "pid", "index", "image")
# `answer` is last, since beside another field it is the label.
TEXTS = ("text", "prediction", "response", "predict", "model_prediction", "answer")
# Fields of lmms-eval's logs of samples: what the model said, and what a filter of the task left of it.
LOG = ("resps", "filtered_resps")
EMPTY, CUT_OFF = "empty", "cut_off"  # reasons why there is no answer, which are counted beside a score
API_FAILED = "Failed to obtain answer via API"  # VLMEvalKit's text in place of an answer


class Answer(NamedTuple):
    value: Any  # text without its thinking, an option's index, or a grade
    where: str  # file and line, for errors
    absent: str = ""  # the reason why there is no answer, which every benchmark counts as wrong; else empty

    @classmethod
    def of(cls, value: Any, where: str) -> "Answer":
        """An answer from its value in a file. Null, or NaN in tables, is no answer."""
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
        """None if there is no answer. Raises `UserError` if it is not a text."""
        if self.absent:
            return None
        if not isinstance(self.value, str):
            raise UserError(f"{self.where}: the answer is no text but {json.dumps(self.value)[:40]}")
        return self.value

    def read(self, reader: Callable[[str], Read], absent: Read) -> Read:
        """`reader(text)`, or `absent` if there is no answer."""
        return absent if self.text is None else reader(self.text)


def question_id(line: Line) -> str:
    """The id of the question, which is unique in most benchmarks."""
    return line.text(*IDS)


def read_answers(path: epath.PathLike, partial: bool = False) -> dict[str, Answer]:
    """The answers of a file by question id. Raises `UserError` for a line that is no answer, and for two different
    answers to a question. `partial` skips a last line that is cut off."""
    return by_key(answer_lines(path, partial), question_id)


def answer_lines(path: epath.PathLike, partial: bool = False) -> list[Line]:
    """The answers of a file as objects. Those of a single object `{id: answer}` get `question_id` and `text`."""
    if is_sheet(path):
        return [_of_row(line) for line in read_sheet(path)]
    if epath.Path(path).suffix.lower() in (".xls", ".csv", ".pkl"):
        raise UserError(f"{path}: save the table as XLSX or TSV, which are read")
    if str(path).endswith(".parquet"):
        return [_of_log(line) for line in parquet_rows(str(path))]
    if is_lines(path):
        return [_of_log(line) for line in read_lines(path, partial)]
    whole = read_json(path)
    if isinstance(whole, dict) and isinstance(whole.get("logs"), list):
        whole = whole["logs"]
    if isinstance(whole, dict) and whole and all(isinstance(value, dict) for value in whole.values()):
        return [Line(f"{path}: question {i}", {"question_id": i} | value) for i, value in whole.items()]
    if isinstance(whole, dict):
        return [Line(f"{path}: question {i}", {"question_id": i, "text": value}) for i, value in whole.items()]
    return _elements(whole, path)


def _of_log(line: Line) -> Line:
    """A line, or the answer that a line of lmms-eval's log of samples has: with the fields of the question that are in
    it, the number of its row (`doc_id`) and the right answer (`target`)."""
    value = line.value
    if "doc_id" not in value or not any(name in value for name in LOG):
        return line
    inner = [some for some in value.values() if isinstance(some, dict)]
    known = next((some for some in inner if any(name in some for name in IDS)), inner[0] if inner else {})
    asked = _first_text(value.get("input", value.get("arguments"))) or known.get("question")
    fields = {"doc_id": value["doc_id"], "target": value.get("target"), "text": _first_text(line.get(*LOG))}
    return Line(line.where, known | fields | ({"prompt": asked} if asked else {}))


def _first_text(value: Any) -> str | None:
    """The first text in nested lists."""
    while isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, str) else None


def refuse_questions(lines: Sequence[Line], suffix: str = "") -> None:
    """Raises `UserError` if all lines are questions, which also have a `text`. Questions end with a question mark or
    with `suffix`."""

    def asks(line: dict[str, Any]) -> bool:
        text, ends = line.get("text"), ("?", suffix) if suffix else ("?",)
        return isinstance(text, str) and text.endswith(ends) and "image" in line and "prompt" not in line

    if lines and all(asks(line.value) for line in lines):
        raise UserError(f"{lines[0].where}: is a question, not an answer: --answers takes what `predict` wrote")


def by_key(lines: Sequence[Line], key: Callable[[Line], str], names: Sequence[str] = TEXTS) -> dict[str, Answer]:
    """The answers by key, from the first of the fields `names`. Raises `UserError` for two different ones of a key."""
    items = ((key(line), answer_of(line, names)._replace(where=""), line.where) for line in lines)
    found = once(items, "question {key} was answered in {first} already, and otherwise")
    return {ident: answer._replace(where=where) for ident, (answer, where) in found.items()}


def _of_row(line: Line) -> Line:
    """A row of a table, where `answer` is the label. An empty cell is an empty text, as in TSV."""
    values = {name: value or "" for name, value in line.value.items() if name not in ("answer", "image")}
    if not any(name in values for name in TEXTS):
        raise UserError(f"{line.where}: has no column `prediction`: is it the table of questions?")
    return Line(line.where, {"question_id": line.get(*IDS)} | values)


def answer_of(line: Line, names: Sequence[str] = TEXTS) -> Answer:
    """The answer in the first of the fields `names`. It is absent if the line's text is, or if its metadata says so."""
    answer = Answer.of(line.get(*names), line.where)
    metadata = line.value.get("metadata")
    if why := metadata.get("no_answer") if isinstance(metadata, dict) else None:
        return answer._replace(absent=CUT_OFF if str(why).startswith((CUT_OFF, "cut off")) else EMPTY)
    found = next(name for name in names if name in line.value)
    if found in TEXTS:
        return answer
    texts = [line.value[name] for name in TEXTS if name in line.value]  # that a grade is about
    return answer._replace(absent=Answer.of(texts[0], line.where).absent if texts else "")


def count_absent(answers: Iterable[Answer]) -> dict[str, int]:
    """The numbers of answers that are `empty` and `cut_off`, without zeros."""
    return dict(Counter(answer.absent for answer in answers if answer.absent))


def _elements(values: Any, path: epath.PathLike) -> list[Line]:
    if not isinstance(values, list):
        raise UserError(f"{path}: holds neither objects one a line, nor an array of them, nor one of answers by id")
    for number, value in enumerate(values):
        if not isinstance(value, dict):
            raise UserError(f"{path}: element {number} is no object")
    return [_of_log(Line(f"{path}: element {number}", _with_number(number, value))) for number, value in
            enumerate(values)]  # fmt: skip


def _with_number(number: int, value: dict[str, Any]) -> dict[str, Any]:
    """An object of an array without ids has its number, as some benchmarks' own files do."""
    return value if any(name in value for name in (*IDS, "doc_id")) else {"doc_id": number} | value


def is_lines(path: epath.PathLike) -> bool:
    """Whether a file is JSONL: its first line is an object, and either has an id or is not the only line."""
    first, _, rest = read_bytes(path).lstrip().partition(b"\n")
    try:
        value = loads(first, strict=False)
    except ValueError:
        return False
    return isinstance(value, dict) and (bool(rest.strip()) or any(name in value for name in (*IDS, "doc_id")))


def read_json(path: epath.PathLike) -> Any:
    """The value in a file. Raises `UserError` if it is not JSON or if an object has a key twice. An array may have NaN,
    which VLMEvalKit writes for the empty cells of a table."""
    text = read_text(path)
    return parse_json(text, path, strict=not (text.lstrip().startswith("[") and "NaN" in text))


class Joined(NamedTuple):
    """Answers with their labels."""

    pairs: list[tuple[Answer, Any]]
    incomplete: dict[str, int]  # the numbers of labels without an answer (`missing`) and the reverse (`unknown`)


def check_asked(answers: Mapping[str, Answer], asked: Collection[str], own: epath.PathLike) -> None:
    """Raises `UserError` for an answer to a question that is not in the benchmark's file `own`. Warns of questions
    without an answer."""
    if unknown := _unknown(answers, asked):
        where, named = unknown
        raise UserError(f"{where}: {own} has no question {named}: are the answers to another benchmark?")
    missing = [ident for ident in asked if ident not in answers]
    if missing:
        warn(f"{len(missing)} of {len(asked)} questions of {own} have no answer, {missing[0]} the first")


def _unknown(answers: Mapping[str, Answer], known: Collection[str]) -> tuple[str, str] | None:
    """Where the first answer with another id than these is, and what names it and the number of others."""
    ids = [ident for ident in answers if ident not in known]
    return (answers[ids[0]].where, ids[0] + f" (and {len(ids) - 1} more)" * (len(ids) > 1)) if ids else None


def join(
    answers: Mapping[str, Answer], labels: Mapping[str, Any], path: epath.PathLike, partial: bool | None = None
) -> Joined:
    """Answers with their labels, in the order of the labels.

    Raises `UserError` for answers without a label and for labels without an answer. `partial` warns of them instead; it
    is None for a command without `--partial`.
    """
    advice = "all have to be answered, and no others" if partial is None else "--partial scores what is there"
    missing = [ident for ident in labels if ident not in answers]
    messages = []
    if unknown := _unknown(answers, labels):
        where, named = unknown
        messages.append(f"{where}: question {named} has none of the {len(labels)} labels: are they of another version?")
    if missing:
        messages.append(f"{path}: has no answer to {len(missing)} of {len(labels)} questions, {missing[0]} the first")
    for message in messages:
        if not partial:
            raise UserError(f"{message}; {advice}")
        warn(message)
    pairs = [(answers[ident], label) for ident, label in labels.items() if ident in answers]
    if not pairs:
        raise UserError(f"{path}: holds no answer to any of {len(labels)} questions")
    counts = {"missing": len(missing), "unknown": len(answers.keys() - labels.keys())}
    return Joined(pairs, {name: count for name, count in counts.items() if count})


def percent(part: float, whole: float) -> float | None:
    """`part / whole` in percent with two decimals; None if `whole` is 0."""
    return round(part / whole * 100, 2) if whole else None


def percent_by(values: Iterable[tuple[str, float]]) -> dict[str, float | None]:
    """The mean of each group in percent, from (group, value from 0 to 1), in the order in which groups appear."""
    groups: dict[str, list[float]] = defaultdict(list)
    for group, value in values:
        groups[group].append(value)
    return {group: percent(sum(some), len(some)) for group, some in groups.items()}

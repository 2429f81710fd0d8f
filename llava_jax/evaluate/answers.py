"""Answers to the questions of a benchmark, as files by anybody have them, and their join with what is right.

A file is JSONL with an object an answer (`question_id` and `text`, or what benchmarks' own results call them), a JSON
array of such objects, or one object `{question id: answer}`.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from etils import epath

from llava_jax.cli import UserError
from llava_jax.evaluate.lines import Line, read_bytes, read_lines, read_text
from llava_jax.thinking import after_thinking

Read = TypeVar("Read")
IDS = ("question_id", "questionId", "id", "image")
TEXTS = ("text", "answer", "prediction", "response")


EMPTY, CUT_OFF = "empty", "cut_off"  # why there is no answer, as it is counted beside a score


class Answer(NamedTuple):
    value: Any  # text without its thinking, an option's index, or a grade
    where: str  # file and line, for errors
    absent: str = ""  # why there is no answer, which counts as a wrong one in every benchmark; empty where there is one

    @classmethod
    def of(cls, value: Any, where: str) -> "Answer":
        """An answer as it stands in a file."""
        if not isinstance(value, str):
            return cls(value, where)
        final = after_thinking(value)
        return cls(final, where, CUT_OFF if final is None else "" if final.strip() else EMPTY)

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
    return str(line.get(*IDS))


def answer_text(line: Line) -> str:
    """What a line answers, to be handed in: an empty text where that is nothing. Raises `UserError` for no text."""
    return answer_of(line).text or ""


def read_answers(path: epath.PathLike, partial: bool = False) -> dict[str, Answer]:
    """The answers of a file by question id. Raises `UserError` at what is no answer, and at a second to a question.

    `partial` leaves out a last line that is cut off.
    """
    return by_key(answer_lines(path, partial), question_id)


def answer_lines(path: epath.PathLike, partial: bool = False) -> list[Line]:
    """A file's answers as objects, with `question_id` and `text` where it has but one object of all."""
    if is_lines(path):
        return read_lines(path, partial)
    whole = read_json(path)
    if isinstance(whole, dict):
        return [Line(f"{path}: question {i}", {"question_id": i, "text": value}) for i, value in whole.items()]
    return _elements(whole, path)


def by_key(lines: Sequence[Line], key: Callable[[Line], str], names: Sequence[str] = TEXTS) -> dict[str, Answer]:
    """Answers, which are the first of these fields, by key. Raises `UserError` at the second of a key."""
    answers: dict[str, Answer] = {}
    for line in lines:
        ident = key(line)
        if ident in answers:
            raise UserError(f"{line.where}: question {ident} was answered in {answers[ident].where} already")
        answers[ident] = answer_of(line, names)
    return answers


def answer_of(line: Line, names: Sequence[str] = TEXTS) -> Answer:
    """The first of these fields. There is no answer where that is a grade of a text that answers nothing, or that text,
    or where the line says so."""
    answer = Answer.of(line.get(*names), line.where)
    texts = [Answer.of(line.value[name], line.where) for name in TEXTS if name in line.value]
    metadata = line.value.get("metadata")
    if why := metadata.get("no_answer") if isinstance(metadata, dict) else None:
        return answer._replace(absent=CUT_OFF if str(why).startswith("cut off") else EMPTY)
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
        value = json.loads(first)
    except ValueError:
        return False
    return isinstance(value, dict) and (bool(rest.strip()) or any(name in value for name in IDS))


def read_json(path: epath.PathLike) -> Any:
    """The value in a file. Raises `UserError` with the line where it is no JSON, and for a key that is there twice."""
    try:
        return json.loads(read_text(path), object_pairs_hook=lambda pairs: _unique(pairs, path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]], path: epath.PathLike) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise UserError(f"{path}: {twice} stands there twice")
    return value


class Joined(NamedTuple):
    """What was answered and what is right."""

    pairs: list[tuple[Answer, Any]]
    incomplete: dict[str, int]  # how many questions have no answer (`missing`), and answers no question (`unknown`)


PARTIAL = "--partial scores what is there"
WHOLE = "all have to be answered, and no others"  # for what cannot be done in part


def join(
    answers: Mapping[str, Answer],
    labels: Mapping[str, Any],
    path: epath.PathLike,
    partial: bool,
    advice: str = PARTIAL,
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
        print(f"warning: {message}", file=sys.stderr)
    pairs = [(answers[ident], label) for ident, label in labels.items() if ident in answers]
    if not pairs:
        raise UserError(f"{path}: holds no answer to any of {len(labels)} questions")
    counts = {"missing": len(missing), "unknown": len(unknown)}
    return Joined(pairs, {name: count for name, count in counts.items() if count})


def percent(part: float, whole: float) -> float | None:
    """Two decimals; None of nothing."""
    return round(part / whole * 100, 2) if whole else None

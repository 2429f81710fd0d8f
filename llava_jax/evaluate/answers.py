"""Answers to the questions of a benchmark, as files by anybody have them, and their join with what is right.

A file is JSONL with an object an answer (`question_id` and `text`, or what benchmarks' own results call them), a JSON
array of such objects, or one object `{question id: answer}`.
"""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from etils import epath

from llava_jax.cli import UserError
from llava_jax.evaluate.lines import Line, read_lines

IDS = ("question_id", "questionId", "id", "image")
TEXTS = ("text", "answer", "prediction", "response")

Label = TypeVar("Label")


class Answer(NamedTuple):
    value: Any  # text, or an option's index
    where: str  # file and line, for errors

    @property
    def text(self) -> str:
        """Raises `UserError` where it is no text."""
        if not isinstance(self.value, str):
            raise UserError(f"{self.where}: the answer is no text but {json.dumps(self.value)[:40]}")
        return self.value


def question_id(line: Line) -> str:
    """What tells questions apart in most benchmarks."""
    return str(line.get(*IDS))


def read_answers(
    path: epath.PathLike, partial: bool = False, key: Callable[[Line], str] = question_id
) -> dict[str, Answer]:
    """The answers of a file by their `key`. Raises `UserError` at what is no answer, and at the second of a key.

    `partial` leaves out a last line that is cut off.
    """
    whole = None if is_lines(path) else read_json(path)
    if isinstance(whole, dict):
        return plain_answers(whole, path)
    lines = read_lines(path, partial) if whole is None else _elements(whole, path)
    answers: dict[str, Answer] = {}
    for line in lines:
        ident = key(line)
        if ident in answers:
            raise UserError(f"{line.where}: question {ident} was answered in {answers[ident].where} already")
        answers[ident] = Answer(line.get(*TEXTS), line.where)
    return answers


def plain_answers(values: Mapping[str, Any], path: epath.PathLike) -> dict[str, Answer]:
    """Answers that stand in one object."""
    return {ident: Answer(value, f"{path}: question {ident}") for ident, value in values.items()}


def _elements(values: Any, path: epath.PathLike) -> list[Line]:
    if not isinstance(values, list):
        raise UserError(f"{path}: holds neither objects one a line, nor an array of them, nor one of answers by id")
    for number, value in enumerate(values):
        if not isinstance(value, dict):
            raise UserError(f"{path}: element {number} is no object")
    return [Line(f"{path}: element {number}", value) for number, value in enumerate(values)]


def is_lines(path: epath.PathLike) -> bool:
    """Whether a file has an object a line: its first line is one, and either tells its id or is not the only line."""
    first, _, rest = epath.Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")
    try:
        value = json.loads(first)
    except ValueError:
        return False
    return isinstance(value, dict) and (bool(rest.strip()) or any(name in value for name in IDS))


def read_json(path: epath.PathLike) -> Any:
    """The value in a file. Raises `UserError` with the line where it is no JSON, and for a key that is there twice."""
    data = epath.Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}: is UTF-16, not UTF-8; convert it: iconv -f utf-16 -t utf-8")
    try:
        return json.loads(data.decode(), object_pairs_hook=lambda pairs: _unique(pairs, path))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}: line {line}: is not UTF-8 (byte {data[error.start]:#x}); convert it: iconv -t utf-8"
        ) from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: is no JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]], path: epath.PathLike) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise UserError(f"{path}: {twice} stands there twice")
    return value


class Joined(NamedTuple):
    """What was answered and what is right, and how many questions have no answer."""

    pairs: list[tuple[Answer, Any]]
    missing: int


def join(answers: Mapping[str, Answer], labels: Mapping[str, Any], path: epath.PathLike, partial: bool) -> Joined:
    """Answers with their labels, in the order of these.

    Raises `UserError` for an answer to what is not asked and, unless `partial`, for questions without an answer.
    """
    for ident, answer in answers.items():
        if ident not in labels:
            raise UserError(
                f"{answer.where}: question {ident} is not among the {len(labels)} labels: those of another version?"
            )
    missing = [ident for ident in labels if ident not in answers]
    if missing:
        message = f"{path}: has no answer to {len(missing)} of {len(labels)} questions, {missing[0]} the first"
        if not partial:
            raise UserError(f"{message}; --partial scores what is there")
        print(f"warning: {message}", file=sys.stderr)
    if not answers:
        raise UserError(f"{path}: holds no answers")
    return Joined([(answers[ident], label) for ident, label in labels.items() if ident in answers], len(missing))


def percent(part: float, whole: float) -> float | None:
    """Two decimals; None of nothing."""
    return round(part / whole * 100, 2) if whole else None

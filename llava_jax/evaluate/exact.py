"""Own questions: the share of answers that are the right one, of all and by category.

Labels are the questions in LLaVA JSON, whose first answers are right, or objects of `question_id` and `answer` (JSONL,
an array, a table), which may be a list of answers of which each is right. Both may tell a `category`.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from llava_jax.cli import UserError
from llava_jax.data.records import Record, local_data, scan
from llava_jax.data.samples import parse_sample, record_value
from llava_jax.evaluate.answers import IDS, Answer, percent, percent_by, question_id
from llava_jax.evaluate.benchmark import Benchmark, Labels, unique
from llava_jax.evaluate.lines import Line
from llava_jax.evaluate.questions import Question, unmarked
from llava_jax.evaluate.sheets import is_sheet, read_sheet

CONVERSATIONS = {"conversations", "messages"}  # fields of samples, of which other objects have none


class Label(NamedTuple):
    answers: tuple[str, ...]  # each is right
    category: str = ""

    @property
    def right(self) -> str:
        return self.answers[0]


class Entry(NamedTuple):
    """A question with its answer, as a file has it."""

    id: str
    question: str  # empty where the file does not tell
    label: Label
    where: str


def normal(text: str) -> str:
    """What is compared: letters' case, white space around and repeated, and full stops at the end do not count."""
    return " ".join(text.split()).rstrip(" .").casefold()


def score(pairs: Sequence[tuple[Answer, Label]]) -> dict[str, Any]:
    """The share of answers that are one of the right ones, but for what `normal` leaves out."""
    right = [(label.category, answer.read(normal, "") in map(normal, label.answers)) for answer, label in pairs]
    named = percent_by(sorted(item for item in right if item[0]))
    accuracy = {"accuracy": percent(sum(value for _, value in right), len(right))}
    return accuracy | ({"by_category": named} if named else {}) | {"total": len(pairs)}


def labels(paths: Sequence[str], lines: Sequence[Line], asked: Sequence[Question]) -> Labels:
    """By question id; where several questions have the same id, by that and the question, which `prompt` tells."""
    entries = [entry for path in paths for entry in read_entries(path)]
    texts: dict[str, set[str]] = defaultdict(set)
    for entry in entries:
        texts[entry.id].add(entry.question)

    def key(ident: str, asked: str) -> str:
        return f"{ident}: {asked}" if len(texts[ident]) > 1 else ident

    def of_answer(line: Line) -> str:
        ident = question_id(line)
        if len(texts.get(ident, ())) < 2:
            return ident
        prompt = line.text("prompt")
        known = [text for text in texts[ident] if prompt == text or prompt.startswith(f"{text}\n")]
        return key(ident, max(known, key=len, default=prompt))

    return Labels(unique((key(entry.id, entry.question), entry.label, entry.where) for entry in entries), of_answer)


def read_entries(path: str) -> Iterator[Entry]:
    """What a file asks and what is right. Raises `UserError` where an entry has no answer."""
    for entry in map(_of_line, read_sheet(path)) if is_sheet(path) else map(_of_record, scan(local_data(path), path)):
        if not all(map(normal, entry.label.answers)) or not entry.label.answers:
            raise UserError(f"{entry.where}: the right answer to question {entry.id} is empty")
        yield entry


def _of_record(record: Record) -> Entry:
    value = record_value(record)
    if not isinstance(value, dict):
        raise UserError(f"{record.where}: is no object but {json.dumps(value)[:40]}")
    line = Line(record.where, value)
    if CONVERSATIONS.isdisjoint(value):
        return _of_line(line)
    sample = parse_sample(record)
    turns = [text for role, text in sample.turns if role != "system"]
    if len(turns) < 2:
        raise UserError(f"{line.where} (id {sample.id}): has no answer to its question")
    return Entry(sample.id, unmarked(turns[0]), Label((turns[1],), _category(line)), line.where)


def _of_line(line: Line) -> Entry:
    answers = line.get("answer", "answers")
    answers = answers if isinstance(answers, list) else [answers]
    if not all(isinstance(answer, str | int | float) and not isinstance(answer, bool) for answer in answers):
        raise UserError(f"{line.where}: the right answer is neither a text nor a list of texts")
    question = str(line.value.get("question", line.value.get("text", "")))
    ident = line.text(*IDS)
    return Entry(ident, unmarked(question), Label(tuple(map(str, answers)), _category(line)), line.where)


def _category(line: Line) -> str:
    category = line.value.get("category")
    return "" if category is None else str(category)


EXACT = Benchmark("own questions: exact answers", labels=labels, score=score)

"""Your own questions: the share of answers that equal the label, in all and by category.

Label files are the questions in LLaVA JSON, whose first answers are right, or objects with `question_id` and `answer`
(JSONL, an array or a table). `answer` may be a list of right answers. Both may have a `category`.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from llava_jax.cli import UserError
from llava_jax.data.records import Record, local_data, scan
from llava_jax.data.samples import parse_sample, record_value
from llava_jax.evaluate.answers import IDS, Answer, percent, percent_by, question_id
from llava_jax.evaluate.benchmark import Benchmark, Labels, register
from llava_jax.evaluate.label_formats import LABEL_FORMATS, Entry, LabelFormat, unique
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


def normal(text: str) -> str:
    """The text that is compared: without case, full stops at the end, leading, trailing and repeated white space."""
    return " ".join(text.split()).rstrip(" .").casefold()


def read_table(path: str) -> Iterator[Entry]:
    return _checked(map(_of_line, read_sheet(path)))


def read_records(path: str) -> Iterator[Entry]:
    return _checked(map(_of_record, scan(local_data(path), path)))


def _checked(entries: Iterable[Entry]) -> Iterator[Entry]:
    """The entries. Raises `UserError` for one without an answer."""
    for entry in entries:
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
    return Entry(sample.id, Label((turns[1],), _category(line)), line.where, unmarked(turns[0]))


def _of_line(line: Line) -> Entry:
    answers = line.get("answer", "answers")
    answers = answers if isinstance(answers, list) else [answers]
    if not all(isinstance(answer, str | int | float) and not isinstance(answer, bool) for answer in answers):
        raise UserError(f"{line.where}: the right answer is neither a text nor a list of texts")
    question = str(line.value.get("question", line.value.get("text", "")))
    ident = line.text(*IDS)
    return Entry(ident, Label(tuple(map(str, answers)), _category(line)), line.where, unmarked(question))


def _category(line: Line) -> str:
    category = line.value.get("category")
    return "" if category is None else str(category)


LABEL_FORMATS.add(LabelFormat(
    "records", "LLaVA JSON, or objects of `question_id` and `answer`", ("exact",), read_records
))  # fmt: skip
LABEL_FORMATS.add(LabelFormat(
    "table", "a table (TSV, XLSX) with these columns", ("exact",), read_table, matches=is_sheet
))  # fmt: skip


@register
class Exact(Benchmark):
    name, what = "exact", "your own questions: exact answers"

    def labels(self, entries: Sequence[Entry], lines: Sequence[Line], asked: Sequence[Question]) -> Labels:
        """By question id. Questions with the same id are told apart by their text, which an answer has in `prompt`."""
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

    def score(self, pairs: Sequence[tuple[Answer, Label]]) -> dict[str, Any]:
        """The share of answers that equal one of the right answers once both are `normal`."""
        right = [(label.category, answer.read(normal, "") in map(normal, label.answers)) for answer, label in pairs]
        named = percent_by(sorted(item for item in right if item[0]))
        accuracy = {"accuracy": percent(sum(value for _, value in right), len(right))}
        return accuracy | ({"by_category": named} if named else {}) | {"total": len(pairs)}

"""MM-Vet: open answers that a judge grades from 0 to 1, by the capabilities that a question needs."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from llava_jax.cli import UserError
from llava_jax.evaluate.answers import (
    Answer,
    answer_lines,
    answer_of,
    by_key,
    check_asked,
    join,
    percent,
    percent_by,
    refuse_questions,
)
from llava_jax.evaluate.benchmark import Benchmark, Labels, register
from llava_jax.evaluate.label_formats import Entry, entries_by_id, field, unique
from llava_jax.evaluate.lines import Line
from llava_jax.evaluate.model_task import Case, ModelTask, chat, read_prompt
from llava_jax.evaluate.questions import Question, read_questions
from llava_jax.llm_api.cost import Message
from llava_jax.llm_api.thinking import after_thinking

if TYPE_CHECKING:
    from llava_jax.llm_api.asking import Outcome

PREFIX = "v1_"  # of question ids in MM-Vet's own files
GRADES = ("grade", "score", "content")  # fields that have a grade, or the text of a judge that begins with one


class Label(NamedTuple):
    capabilities: tuple[str, ...]


def parse_grade(text: str) -> float | None:
    """The grade from 0 to 1 that a judge's text begins with, or None."""
    words = text.split()
    try:
        grade = float(words[0].rstrip(".,;")) if words else -1.0
    except ValueError:
        return None
    return grade if 0 <= grade <= 1 else None


def grade(answer: Answer) -> float | None:
    """The stored grade (the mean of several), or that of the judge's text."""
    value = answer.value
    if isinstance(value, dict):  # MM-Vet's own grader keeps lists of repeats
        value = value.get("score", value.get("content"))
    values = value if isinstance(value, list) else [value]
    grades = [parse_grade(after_thinking(value) or "") if isinstance(value, str) else value for value in values]
    known = [g for g in grades if isinstance(g, int | float) and not isinstance(g, bool) and 0 <= g <= 1]
    return sum(known) / len(known) if known else None


def key(line: Line) -> str:
    """The question id of an answer or a grade, without MM-Vet's prefix."""
    return line.text("question_id", "id").removeprefix(PREFIX)


def read(path: str) -> Iterator[Entry]:
    """The entries of mm-vet.json; ids lose their prefix."""
    for where, ident, entry in entries_by_id(path):
        yield Entry(ident.removeprefix(PREFIX), entry, where)


# ------------------------------------------------------------------------------------------------------------- judging

SYSTEM = "You grade answers to questions about pictures by comparing them with what is right."
PROMPT = read_prompt("mm_vet_judge.txt")


class Judge(ModelTask):
    """Has a language model grade answers to MM-Vet from 0 to 1, given the right answer. `score mm-vet` takes grades.

    Grades by another judge or other instructions than the benchmark's own are not comparable with published ones.
    """

    epilog = """example:
  python -m llava_jax.evaluate judge mm-vet --answers answers.jsonl --labels mm-vet.json --judge gpt-4-0613 \\
    --output grades.jsonl
  python -m llava_jax.evaluate score mm-vet --answers grades.jsonl --labels mm-vet.json"""
    writes, failed = "grades", "failed"
    cut_counts = True  # the grade comes first
    max_tokens = 16

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--answers", required=True, metavar="F", help="JSONL of question_id, text")
        parser.add_argument("--labels", required=True, metavar="F", help="MM-Vet's mm-vet.json")

    def prompts(self, args: argparse.Namespace) -> tuple[list[list[Case]], Any]:
        """A prompt for each answer that is not absent."""
        entries = {entry.id: entry for entry in read(args.labels)}
        lines = answer_lines(args.answers)
        refuse_questions(lines)
        joined = join(by_key(lines, key), entries, args.answers)
        cases = [Case(entry.id, _messages(entry, answer), (entry, answer)) for answer, entry in joined.pairs]
        return [cases], [SYSTEM, PROMPT]

    def read(self, about: tuple[Entry, Answer], text: str) -> float | None:
        return parse_grade(text)

    def line(self, about: tuple[Entry, Answer], outcome: "Outcome | None", by: Mapping[str, str]) -> dict[str, Any]:
        entry, answer = about
        grade = outcome.value if outcome else 0.0
        graded = {
            "question_id": f"{PREFIX}{entry.id}",
            "prompt": entry.label["question"],
            "text": answer.text,
            "content": outcome.shown if outcome else f"no answer: {answer.absent}",
            "grade": -1 if grade is None else grade,
            **by,
        }
        return graded | ({"metadata": {"no_answer": answer.absent}} if answer.absent else {})


def _messages(entry: Entry, answer: Answer) -> list[Message] | None:
    question, right = (field(entry.label, name, entry.where) for name in ("question", "answer"))
    filled = PROMPT.format(question=question, right=right, answer=answer.text)
    return None if answer.absent else chat(SYSTEM, filled)


@register
class MmVet(Benchmark):
    name, what = "mm-vet", "MM-Vet: grades by a judge, by capability"
    label_files, entries = "`mm-vet.json`", staticmethod(read)
    max_new_tokens = 1024
    fields = (*GRADES, "text")
    ids = r"(v1_)?\d{1,3}"
    judge = Judge()

    def questions(self, path: str) -> Iterator[Question]:
        for where, ident, entry in entries_by_id(path):
            yield Question(ident, field(entry, "question", where), (field(entry, "imagename", where),))

    def labels(self, entries: Sequence[Entry], lines: Sequence[Line], asked: Sequence[Question]) -> Labels:
        """Raises `UserError` if `lines` are answers that are not graded yet, or if no judgement has a grade."""
        for line in lines:
            if isinstance(line.value.get("text"), str | None) and not any(name in line.value for name in GRADES):
                raise UserError(
                    f"{line.where}: has no grade: first have the answers graded by `judge mm-vet --output grades.jsonl`"
                    ", then score grades.jsonl"
                )
        answers = [answer_of(line, (*GRADES, "text")) for line in lines]
        if answers and all(grade(answer) is None and not answer.absent for answer in answers):
            raise UserError(f"{lines[0].where}: has no grade, nor has any other of the {len(lines)} judgements")
        found = unique(
            (entry.id, Label(tuple(map(str, field(entry.label, "capability", entry.where, list)))), entry.where)
            for entry in entries
        )
        return Labels(found, key)

    def score(self, pairs: Sequence[tuple[Answer, Label]]) -> dict[str, Any]:
        """Mean grades in percent, of all answers and by capability. An absent answer has grade 0; `failed` judgements,
        which have no grade, are left out."""
        grades = [(0.0 if answer.absent else grade(answer), label) for answer, label in pairs]
        known = [value for value, _ in grades if value is not None]
        taken = ((name, value) for value, label in grades if value is not None for name in label.capabilities)
        return {
            "score": percent(sum(known), len(known)),
            "by_capability": dict(sorted(percent_by(taken).items())),
            "total": len(known),
            "failed": len(grades) - len(known),
        }

    def submission(self, lines: Sequence[Line], own: str | None) -> bytes:
        """The file that MM-Vet's grader reads."""
        answers = by_key(lines, key)
        if own:
            asked = (str(question.id).removeprefix(PREFIX) for question in read_questions([own], "", self.questions))
            check_asked(answers, dict.fromkeys(asked), own)
        texts = {f"{PREFIX}{ident}": answer.text or "" for ident, answer in answers.items()}
        return json.dumps(texts, indent=2).encode() + b"\n"

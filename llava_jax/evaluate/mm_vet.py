"""MM-Vet: open answers that a judge grades from 0 to 1, by the capabilities that a question takes."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from llava_jax.cli import UserError
from llava_jax.evaluate.answers import Answer, answer_of, by_key, check_asked, entries_by_id, percent, percent_by
from llava_jax.evaluate.benchmark import Benchmark, Labels, field, unique
from llava_jax.evaluate.lines import Line
from llava_jax.evaluate.questions import Question, read_questions
from llava_jax.llm_api.thinking import after_thinking

PREFIX = "v1_"  # of question ids in MM-Vet's own files
GRADES = ("grade", "score", "content")  # fields that have a grade, or the text of a judge that begins with one


class Label(NamedTuple):
    capabilities: tuple[str, ...]


def parse_grade(text: str) -> float | None:
    """The grade that a judge's text begins with; None where it's none from 0 to 1."""
    words = text.split()
    try:
        grade = float(words[0].rstrip(".,;")) if words else -1.0
    except ValueError:
        return None
    return grade if 0 <= grade <= 1 else None


def grade(answer: Answer) -> float | None:
    """The stored grade (of several, the mean), or that of the judge's text."""
    value = answer.value
    if isinstance(value, dict):  # MM-Vet's own grader keeps lists of repeats
        value = value.get("score", value.get("content"))
    values = value if isinstance(value, list) else [value]
    grades = [parse_grade(after_thinking(value) or "") if isinstance(value, str) else value for value in values]
    known = [g for g in grades if isinstance(g, int | float) and not isinstance(g, bool) and 0 <= g <= 1]
    return sum(known) / len(known) if known else None


def score(pairs: Sequence[tuple[Answer, Label]]) -> dict[str, Any]:
    """Mean grades in percent, of all and by capability. `failed` judgements have no grade and are left out; where there
    is no answer the grade is 0."""
    grades = [(0.0 if answer.absent else grade(answer), label) for answer, label in pairs]
    known = [value for value, _ in grades if value is not None]
    taken = ((name, value) for value, label in grades if value is not None for name in label.capabilities)
    return {
        "score": percent(sum(known), len(known)),
        "by_capability": dict(sorted(percent_by(taken).items())),
        "total": len(known),
        "failed": len(grades) - len(known),
    }


def labels(paths: Sequence[str], lines: Sequence[Line], asked: Sequence[Question]) -> Labels:
    """Raises `UserError` where `lines` are answers that nobody graded, or where no judgement has a grade."""
    for line in lines:
        if isinstance(line.value.get("text"), str | None) and not any(name in line.value for name in GRADES):
            raise UserError(
                f"{line.where}: has no grade: first have the answers graded by `judge mm-vet --output grades.jsonl`, "
                "then score grades.jsonl"
            )
    answers = [answer_of(line, (*GRADES, "text")) for line in lines]
    if answers and all(grade(answer) is None and not answer.absent for answer in answers):
        raise UserError(f"{lines[0].where}: has no grade, nor has any other of the {len(lines)} judgements")
    found = unique(
        (ident.removeprefix(PREFIX), Label(tuple(map(str, field(entry, "capability", where, list)))), where)
        for path in paths
        for where, ident, entry in read_own(path)
    )
    return Labels(found, key)


def key(line: Line) -> str:
    """The question of an answer or of a grade, whose id has MM-Vet's prefix or not."""
    return line.text("question_id", "id").removeprefix(PREFIX)


def read_own(path: str) -> list[tuple[str, str, Any]]:
    """The entries of mm-vet.json: where each stands, its id, and what it is."""
    return entries_by_id(path, ", as mm-vet.json is")


def questions(path: str) -> Iterator[Question]:
    for where, ident, entry in read_own(path):
        yield Question(ident, field(entry, "question", where), (field(entry, "imagename", where),))


def submission(lines: Sequence[Line], own: str | None) -> bytes:
    """What MM-Vet's grader reads."""
    answers = by_key(lines, key)
    if own:
        asked = (str(question.id).removeprefix(PREFIX) for question in read_questions([own], "", questions))
        check_asked(answers, dict.fromkeys(asked), own)
    texts = {f"{PREFIX}{ident}": answer.text or "" for ident, answer in answers.items()}
    return json.dumps(texts, indent=2).encode() + b"\n"


MM_VET = Benchmark(
    "MM-Vet: grades by a judge", questions, max_new_tokens=1024, labels=labels, score=score, submission=submission,
    fields=(*GRADES, "text"), ids=r"(v1_)?\d{1,3}",
)  # fmt: skip

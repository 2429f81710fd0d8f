"""MM-Vet: open answers that a judge grades from 0 to 1, by the capabilities that a question takes."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from llava_jax.cli import UserError
from llava_jax.evaluate.answers import Answer, answer_text, percent, read_json
from llava_jax.evaluate.benchmark import Benchmark, Labels, field
from llava_jax.evaluate.lines import Line
from llava_jax.evaluate.questions import Question
from llava_jax.thinking import after_thinking

PREFIX = "v1_"  # of question ids in MM-Vet's own files


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
    by_capability: dict[str, list[float]] = defaultdict(list)
    for value, label in grades:
        for capability in label.capabilities if value is not None else ():
            by_capability[capability].append(value)
    known = [value for value, _ in grades if value is not None]
    return {
        "score": percent(sum(known), len(known)),
        "by_capability": {name: percent(sum(some), len(some)) for name, some in sorted(by_capability.items())},
        "total": len(known),
        "failed": len(grades) - len(known),
    }


def labels(paths: Sequence[str], lines: Sequence[Line], asked: Sequence[Question]) -> Labels:
    found = {
        ident.removeprefix(PREFIX): Label(
            tuple(map(str, field(entry, "capability", f"{path}: question {ident}", list)))
        )
        for path in paths
        for ident, entry in _entries(path)
    }
    return Labels(found, lambda line: str(line.get("question_id", "id")).removeprefix(PREFIX))


def _entries(path: str) -> list[tuple[str, Any]]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: is no object of questions by id, as mm-vet.json is")
    return list(value.items())


def questions(path: str) -> Iterator[Question]:
    for ident, entry in _entries(path):
        where = f"{path}: question {ident}"
        yield Question(ident, field(entry, "question", where), (field(entry, "imagename", where),))


def submission(lines: Sequence[Line], own: str | None) -> bytes:
    """What MM-Vet's grader reads."""
    ids = [str(line.get("question_id")).removeprefix(PREFIX) for line in lines]
    answers = {f"{PREFIX}{ident}": answer_text(line) for ident, line in zip(ids, lines, strict=True)}
    return json.dumps(answers, indent=2).encode() + b"\n"


MM_VET = Benchmark(
    "MM-Vet: grades by a judge", questions, max_new_tokens=1024, labels=labels, score=score, submission=submission,
    fields=("grade", "score", "content", "text"),
)  # fmt: skip

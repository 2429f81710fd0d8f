"""TextVQA: short answers that have to be read in the picture.

The original's question ids are those of pictures, so the prompt tells which question a line answers.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from llava_jax.cli import UserError
from llava_jax.evaluate.answers import Answer, check_asked, percent, question_id, read_json
from llava_jax.evaluate.benchmark import SHORT, Benchmark, Labels, field, listed
from llava_jax.evaluate.lines import Line
from llava_jax.evaluate.questions import Question
from llava_jax.evaluate.vqa import Label
from llava_jax.evaluate.vqa_answers import soft_accuracy, submitted

AMONG_TOKENS = re.compile(r"^OCR tokens: .*?Question: (.*?) Short answer:", re.DOTALL)
APART = ("Reference OCR token:", SHORT)


def score(pairs: Sequence[tuple[Answer, Label]]) -> dict[str, Any]:
    """Soft accuracy of answers normalised as people's."""
    accuracies = [
        soft_accuracy(a.read(submitted, None), [submitted(text) for text in label.answers]) for a, label in pairs
    ]
    return {"accuracy": percent(sum(accuracies), len(accuracies)), "total": len(pairs)}


def labels(paths: Sequence[str], lines: Sequence[Line], asked: Sequence[Question]) -> Labels:
    entries = _entries(paths, lines)
    return Labels({key: _texts(value, where) for key, (where, value) in entries.items()}, entries.key, entries.again)


def _entries(paths: Sequence[str], lines: Sequence[Line]) -> Labels:
    """Where each entry stands and what it is, by picture and question, since published answers have the picture's id;
    or by the questions' own ids. What is asked twice about a picture has its answers in the same order."""
    entries = [entry for path in paths for entry in listed(read_json(path), "data", path)]
    asked = [
        _picture_and_question(field(value, "image_id", where), field(value, "question", where, str))
        for where, value in entries
    ]
    keys = _numbered(asked)
    again = {key: first for key, first in zip(keys, asked, strict=True) if key != first}
    found = dict(zip(keys, entries, strict=True))
    by_id = {str(value["question_id"]): key for key, (_, value) in found.items() if "question_id" in value}

    def plain(line: Line) -> str:
        ident, prompt = question_id(line), line.value.get("prompt")
        if ident in by_id and (prompt is None or _asks(prompt, found[by_id[ident]][1])):
            return by_id[ident]
        return _picture_and_question(ident, asked_in(line.text("prompt")))

    numbered = dict(zip((line.where for line in lines), _numbered(map(plain, lines)), strict=True))

    def key(line: Line) -> str:
        return numbered[line.where] if numbered.get(line.where) in found else plain(line)

    return Labels(found, key, again)


def _texts(value: Any, where: str) -> Label:
    answers = field(value, "answers", where, list)
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise UserError(f"{where}: its answers are no texts of people")
    return Label(tuple(answers))


def _numbered(keys: Iterable[str]) -> list[str]:
    """Keys, of which those that were there before have a number."""
    seen: Counter[str] = Counter()
    result = []
    for key in keys:
        seen[key] += 1
        result.append(key if seen[key] == 1 else f"{key} ({seen[key]})")
    return result


def _asks(prompt: Any, entry: Any) -> bool:
    """Whether a prompt has the entry's question: ids of other benchmarks may be the same numbers."""
    return entry["question"].strip().lower() in str(prompt).lower()


def _picture_and_question(image: Any, question: str) -> str:
    return f"{image}: {question.lower().strip()}"


def asked_in(prompt: str) -> str:
    """The question in a prompt of one of the published forms: among OCR tokens (`OCR tokens: ... Question: ... Short
    answer:`), or with them and the format of the answer in lines of their own."""
    if found := AMONG_TOKENS.search(prompt):
        return found[1]
    return "\n".join(line for line in prompt.split("\n") if not line.startswith(APART))


def questions(path: str) -> Iterator[Question]:
    """Without OCR tokens, which the v1.5 release showed: its own file of questions has them."""
    for where, question in listed(read_json(path), "data", path):
        image = field(question, "image_id", where)
        yield Question(image, field(question, "question", where), (f"{image}.jpg",))


def submission(lines: Sequence[Line], own: str | None) -> bytes:
    """The server knows questions by ids that published answers lack."""
    if own is None:
        raise UserError("--labels: TextVQA's JSON of questions is needed, since its server wants the ids there")
    entries = _entries([own], lines)
    answers = entries.answers(lines)
    check_asked(answers, entries, own)
    rows = []
    for key, answer in answers.items():
        where, value = entries[key]
        ident = field(value, "question_id", where)
        rows.append({"question_id": ident, "image_id": value["image_id"], "answer": submitted(answer.text or "")})
    return json.dumps(rows).encode() + b"\n"


TEXTVQA = Benchmark("TextVQA: soft accuracy", questions, SHORT, labels=labels, score=score, submission=submission)

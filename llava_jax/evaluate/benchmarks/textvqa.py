"""TextVQA: short answers that have to be read in the image.

The question ids of published answers are those of images, so the prompt says which question a line answers.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from llava_jax.cli import UserError
from llava_jax.evaluate import dataset_files as files
from llava_jax.evaluate.answers import Answer, check_asked, percent, question_id, read_json
from llava_jax.evaluate.benchmark import SHORT, Benchmark, Labels, register
from llava_jax.evaluate.benchmarks.vqa import Label
from llava_jax.evaluate.label_formats import field, listed
from llava_jax.evaluate.lines import Line
from llava_jax.evaluate.questions import Question
from llava_jax.evaluate.rule_texts import vqa_words
from llava_jax.evaluate.rules import LMMS, OFFICIAL, VLMEVAL, Reading, Rule, plain
from llava_jax.evaluate.vqa_answers import soft_accuracy, submitted

AMONG_TOKENS = re.compile(r"^OCR tokens: .*?Question: (.*?) Short answer:", re.DOTALL)
APART = ("Reference OCR token:", SHORT)


def read(path: str) -> list[tuple[str, Any]]:
    """The entries of TextVQA's JSON, each after its place in the file."""
    return listed(read_json(path), "data", path)


def _joined(entries: Sequence[tuple[str, Any]], lines: Sequence[Line]) -> Labels:
    """The entries by image and question, since published answers have the image's id, or by the questions' own ids.
    Repeated questions about an image match its answers in order."""
    asked = [
        _image_and_question(field(value, "image_id", where), field(value, "question", where, str))
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
        return _image_and_question(ident, asked_in(line.text("prompt")))

    numbered = dict(zip((line.where for line in lines), _numbered(map(plain, lines)), strict=True))

    def key(line: Line) -> str:
        return numbered[line.where] if numbered.get(line.where) in found else plain(line)

    return Labels(found, key, again)


def _people(value: Any, where: str) -> Label:
    answers = field(value, "answers", where, list)
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise UserError(f"{where}: its answers are no texts of people")
    return Label(tuple(answers))


def _numbered(keys: Iterable[str]) -> list[str]:
    """The keys; repeated ones get a number."""
    seen: Counter[str] = Counter()
    result = []
    for key in keys:
        seen[key] += 1
        result.append(key if seen[key] == 1 else f"{key} ({seen[key]})")
    return result


def _asks(prompt: Any, entry: Any) -> bool:
    """Whether a prompt contains the entry's question: other benchmarks may have the same ids."""
    return entry["question"].strip().lower() in str(prompt).lower()


def _image_and_question(image: Any, question: str) -> str:
    return f"{image}: {question.lower().strip()}"


def asked_in(prompt: str) -> str:
    """The question in a published prompt: either `OCR tokens: ... Question: ... Short answer:`, or with OCR tokens and
    the format of the answer in separate lines."""
    if found := AMONG_TOKENS.search(prompt):
        return found[1]
    return "\n".join(line for line in prompt.split("\n") if not line.startswith(APART))


def _soft(words: Callable[[str], str]) -> Callable[[str, Label], Reading]:
    def read(text: str, label: Label) -> Reading:
        said = words(text)
        return Reading(soft_accuracy(said, [words(one) for one in label.answers]), said, "compared as words")

    return read


def _of_row(line: Line) -> tuple[list[Label], list[str], str]:
    people = files.listing(files.first(line.value, "answers", "answer"))
    if not people:
        raise UserError(f"{line.where}: has no answers of people")
    return [Label(tuple(people))], [], ""


@register
class TextVqa(Benchmark):
    name, what = "textvqa", "TextVQA: soft accuracy"
    label_files, entries, of_row = "TextVQA's JSON with `answers`", staticmethod(read), staticmethod(_of_row)
    suffix = SHORT
    rules = {
        OFFICIAL: Rule("soft accuracy of ten people; words as the release compares them", _soft(submitted), plain),
        LMMS: Rule("soft accuracy of ten people; words as the release compares them", _soft(submitted), plain),
        VLMEVAL: Rule("soft accuracy of ten people; a full stop next to a digit stays", _soft(vqa_words), plain),
    }

    def questions(self, path: str) -> Iterator[Question]:
        """Without the OCR tokens that the v1.5 release adds in its own file of questions."""
        for where, question in read(path):
            image = field(question, "image_id", where)
            yield Question(image, field(question, "question", where), (f"{image}.jpg",))

    def labels(self, entries: Sequence[tuple[str, Any]], lines: Sequence[Line], asked: Sequence[Question]) -> Labels:
        found = _joined(entries, lines)
        return Labels({key: _people(value, where) for key, (where, value) in found.items()}, found.key, found.again)

    def score(self, pairs: Sequence[tuple[Answer, Label]]) -> dict[str, Any]:
        """Soft accuracy. Answers and labels are normalized in the same way."""
        accuracies = [
            soft_accuracy(a.read(submitted, None), [submitted(text) for text in label.answers]) for a, label in pairs
        ]
        return {"accuracy": percent(sum(accuracies), len(accuracies)), "total": len(pairs)}

    def submission(self, lines: Sequence[Line], own: str | None) -> bytes:
        """The server knows questions by ids that published answers do not have."""
        if own is None:
            raise UserError("--labels: TextVQA's JSON of questions is needed, since its server wants the ids there")
        entries = _joined(read(own), lines)
        answers = entries.answers(lines)
        check_asked(answers, entries, own)
        rows = []
        for key, answer in answers.items():
            where, value = entries[key]
            ident = field(value, "question_id", where)
            rows.append({"question_id": ident, "image_id": value["image_id"], "answer": submitted(answer.text or "")})
        return json.dumps(rows).encode() + b"\n"

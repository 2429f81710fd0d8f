"""SEED-Bench: questions with four options about images and videos."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from llava_jax.evaluate.answers import IDS, Answer, by_key, check_asked, percent_by, question_id, read_json
from llava_jax.evaluate.benchmark import LETTER, Benchmark, by_kind, register
from llava_jax.evaluate.label_formats import Entry, field, listed
from llava_jax.evaluate.lines import Line
from llava_jax.evaluate.questions import Question

LETTERS = "ABCD"


class Label(NamedTuple):
    right: str
    kind: str
    medium: str  # image, video


def read(path: str) -> Iterator[Entry]:
    value = read_json(path)
    kinds = {str(number): name for name, number in field(value, "question_type", path, dict).items()}
    for where, entry in listed(value, "questions", path):
        kind = str(field(entry, "question_type_id", where))
        medium = str(entry.get("data_type", "image"))
        label = Label(field(entry, "answer", where, str), kinds.get(kind, kind), medium)
        yield Entry(str(field(entry, "question_id", where)), label, where)


@register
class SeedBench(Benchmark):
    name, what = "seed", "SEED-Bench: right letters, of images and of videos"
    label_files, entries = "SEED-Bench's JSON", staticmethod(read)
    suffix = LETTER
    ids = r"v?\d+"

    def questions(self, path: str) -> Iterator[Question]:
        """The questions about images. Those about videos are in the v1.5 release's file of questions, with the frames
        that it shows."""
        for where, entry in listed(read_json(path), "questions", path):
            if entry.get("data_type", "image") != "image":
                continue
            options = [f"{letter}. {field(entry, f'choice_{letter.lower()}', where)}" for letter in LETTERS]
            text = "\n".join([field(entry, "question", where), *options])
            yield Question(field(entry, "question_id", where), text, (str(field(entry, "data_id", where)),))

    def score(self, pairs: Sequence[tuple[Answer, Label]]) -> dict[str, Any]:
        """The share of answers that are exactly the right letter, as published. `failed` answers are no letter."""
        read = [(answer.read(str.strip, ""), label) for answer, label in pairs]
        scores = by_kind([(label.kind, said == label.right) for said, label in read])
        by_medium = percent_by((label.medium, said == label.right) for said, label in read)
        failed = sum(said not in set(LETTERS) for said, _ in read)
        return {"accuracy": scores.pop("accuracy")} | by_medium | scores | {"failed": failed}

    def submission(self, lines: Sequence[Line], own: str | None) -> bytes:
        """All answers have to be to questions of `own`, SEED-Bench's JSON."""
        answers = by_key(lines, question_id)
        if own:
            check_asked(answers, self.read_labels([own], lines, ()), own)
        ids = {question_id(line): line.get(*IDS) for line in lines}
        rows = [{"question_id": ids[ident], "prediction": answer.text or ""} for ident, answer in answers.items()]
        return b"".join(json.dumps(row).encode() + b"\n" for row in rows)

"""Questions with short answers: VQAv2, VizWiz, GQA."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from llava_jax.cli import UserError
from llava_jax.evaluate.answers import IDS, Answer, answer_text, percent, question_id, read_json
from llava_jax.evaluate.benchmark import SHORT, Benchmark, Labels, field, listed, unique
from llava_jax.evaluate.lines import Line
from llava_jax.evaluate.questions import Question, read_questions
from llava_jax.evaluate.vqa_answers import official, soft_accuracy, submitted

UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


class Label(NamedTuple):
    answers: tuple[str, ...]  # of people
    kind: str = ""  # of answer

    @property
    def right(self) -> str:
        """What most said."""
        return max(self.answers, key=self.answers.count)


# ------------------------------------------------------------------------------------------------------------ scoring


def score_vqav2(pairs: Sequence[tuple[Answer, Label]]) -> dict[str, Any]:
    """Soft accuracy as the challenge's server computes it of what the published models submitted: where people agree,
    answers are compared as they are."""
    return _by_kind(
        [(label.kind, _vqav2_accuracy(answer.read(submitted, None), label.answers)) for answer, label in pairs]
    )


def _vqav2_accuracy(answer: str | None, people: Sequence[str]) -> float:
    people = [" ".join(text.split("\n")).replace("\t", " ").strip() for text in people]
    if len(set(people)) > 1:
        answer, people = answer if answer is None else official(answer), [official(text) for text in people]
    return soft_accuracy(answer, people)


def score_vizwiz(pairs: Sequence[tuple[Answer, Label]]) -> dict[str, Any]:
    """The same by VizWiz's server, which normalises the answer and never what people said."""
    return _by_kind(
        [
            (label.kind, soft_accuracy(answer.read(lambda text: official(submitted(text)), None), label.answers))
            for answer, label in pairs
        ]
    )


def score_gqa(pairs: Sequence[tuple[Answer, Label]]) -> dict[str, Any]:
    """The share of answers that are exactly right, but for case and full stops at the end."""
    return _by_kind(
        [(label.kind, float(answer.read(gqa_prediction, None) == label.answers[0])) for answer, label in pairs]
    )


def gqa_prediction(text: str) -> str:
    return text.rstrip(".").lower()


def _by_kind(accuracies: Sequence[tuple[str, float]]) -> dict[str, Any]:
    kinds = defaultdict(list)
    for kind, accuracy in accuracies:
        kinds[kind].append(accuracy)
    return {
        "accuracy": percent(sum(accuracy for _, accuracy in accuracies), len(accuracies)),
        "by_kind": {kind: percent(sum(values), len(values)) for kind, values in sorted(kinds.items())},
        "total": len(accuracies),
    }


# ------------------------------------------------------------------------------------------------- labels and questions


def vqav2_labels(paths: Sequence[str], lines: Sequence[Line], asked: Sequence[Question]) -> Labels:
    def labels() -> Iterator[tuple[str, Label, str]]:
        for path in paths:
            for where, value in listed(read_json(path), "annotations", path):
                yield str(field(value, "question_id", where)), _people(value, where), where

    return Labels(unique(labels()))


def vizwiz_labels(paths: Sequence[str], lines: Sequence[Line], asked: Sequence[Question]) -> Labels:
    def labels() -> Iterator[tuple[str, Label, str]]:
        for path in paths:
            for where, value in listed(read_json(path), "", path):
                yield str(field(value, "image", where)), _people(value, where), where

    pictures = _pictures(asked)

    def key(line: Line) -> str:
        ident = question_id(line)
        return pictures.get(ident, ident)

    return Labels(unique(labels()), key)


def _pictures(asked: Sequence[Question]) -> dict[str, str]:
    """The names of the pictures that are asked about, by the ids of the questions."""
    return {str(question.id): PurePath(str(question.pictures[0])).name for question in asked if question.pictures}


def _people(value: Any, where: str) -> Label:
    answers = [field(answer, "answer", where, str) for answer in field(value, "answers", where, list)]
    if not answers:
        raise UserError(f"{where}: has no answers of people")
    return Label(tuple(answers), str(value.get("answer_type", "other")))


def gqa_labels(paths: Sequence[str], lines: Sequence[Line], asked: Sequence[Question]) -> Labels:
    def labels() -> Iterator[tuple[str, Label, str]]:
        for path in paths:
            for ident, value in _gqa(path):
                where = f"{path}: question {ident}"
                structure = field(field(value, "types", where), "structural", where)
                kind = "open" if structure == "query" else "binary"
                yield ident, Label((field(value, "answer", where, str),), kind), where

    return Labels(unique(labels()))


def _gqa(path: str) -> list[tuple[str, Any]]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: is no object of questions by id: is it a file of another kind?")
    return list(value.items())


def vqav2_questions(path: str) -> Iterator[Question]:
    """Of v2_OpenEnded_mscoco_*_questions.json, whose pictures are COCO's."""
    value = read_json(path)
    split = str(field(value, "data_subtype", path)).replace("test-dev2015", "test2015")
    for where, question in listed(value, "questions", path):
        image = f"COCO_{split}_{field(question, 'image_id', where, int):012d}.jpg"
        yield Question(field(question, "question_id", where), field(question, "question", where), (image,))


def vizwiz_questions(path: str) -> Iterator[Question]:
    for where, question in listed(read_json(path), "", path):
        image = field(question, "image", where)
        yield Question(image, f"{field(question, 'question', where)}\n{UNANSWERABLE}", (image,))


def gqa_questions(path: str) -> Iterator[Question]:
    for ident, question in _gqa(path):
        where = f"{path}: question {ident}"
        yield Question(ident, field(question, "question", where), (f"{field(question, 'imageId', where)}.jpg",))


# --------------------------------------------------------------------------------------------------------- submissions


def _array(entries: Sequence[dict[str, Any]]) -> bytes:
    return json.dumps(entries).encode() + b"\n"


def submit_vqav2(lines: Sequence[Line], own: str | None) -> bytes:
    """The server wants all questions of its split: those of `own` that have no answer get an empty one."""
    answers = {str(line.get(*IDS)): (line.get(*IDS), submitted(answer_text(line))) for line in lines}
    for question in read_questions([own], "", vqav2_questions) if own else ():
        answers.setdefault(str(question.id), (question.id, ""))
    return _array([{"question_id": ident, "answer": answer} for ident, answer in answers.values()])


def submit_vizwiz(lines: Sequence[Line], own: str | None) -> bytes:
    """The server knows questions by their pictures, which `own` tells where the ids are others."""
    pictures = _pictures(read_questions([own], "", vizwiz_questions)) if own else {}
    entries = []
    for line in lines:
        picture = pictures.get(question_id(line), question_id(line))
        if not PurePath(picture).suffix:
            raise UserError(f"{line.where}: {picture} names no picture: --labels with the questions tells which it is")
        entries.append({"image": picture, "answer": submitted(answer_text(line))})
    return _array(entries)


def submit_gqa(lines: Sequence[Line], own: str | None) -> bytes:
    return _array([{"questionId": line.get(*IDS), "prediction": gqa_prediction(answer_text(line))} for line in lines])


VQAV2 = Benchmark(
    "VQAv2: soft accuracy", vqav2_questions, SHORT, labels=vqav2_labels, score=score_vqav2, submission=submit_vqav2
)
VIZWIZ = Benchmark(
    "VizWiz: soft accuracy", vizwiz_questions, SHORT, labels=vizwiz_labels, score=score_vizwiz,
    submission=submit_vizwiz,
)  # fmt: skip
GQA = Benchmark("GQA: exact answers", gqa_questions, SHORT, labels=gqa_labels, score=score_gqa, submission=submit_gqa)

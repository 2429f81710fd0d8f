"""Questions with short answers: VQAv2, TextVQA, VizWiz, GQA."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from llava_jax.cli import UserError
from llava_jax.evaluate.answers import IDS, Answer, percent, question_id, read_json
from llava_jax.evaluate.benchmark import SHORT, Benchmark, Labels, field, listed, unique
from llava_jax.evaluate.lines import Line
from llava_jax.evaluate.questions import Question
from llava_jax.evaluate.vqa_answers import official, soft_accuracy, submitted

UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


class Label(NamedTuple):
    answers: tuple[str, ...]  # of people
    kind: str  # of answer


# ------------------------------------------------------------------------------------------------------------ scoring


def score_challenge(pairs: Sequence[tuple[Answer, Label]]) -> dict[str, Any]:
    """Soft accuracy as the challenges' servers compute it of what the published models submitted: where people agree,
    answers are compared as they are."""
    return _by_kind(
        [(label.kind, _challenge_accuracy(submitted(answer.text), label.answers)) for answer, label in pairs]
    )


def _challenge_accuracy(answer: str, people: Sequence[str]) -> float:
    people = [" ".join(text.split("\n")).replace("\t", " ").strip() for text in people]
    if len(set(people)) > 1:
        answer, people = official(answer), [official(text) for text in people]
    return soft_accuracy(answer, people)


def score_textvqa(pairs: Sequence[tuple[Answer, Label]]) -> dict[str, Any]:
    """Soft accuracy of answers normalised as people's."""
    accuracies = [soft_accuracy(submitted(a.text), [submitted(text) for text in label.answers]) for a, label in pairs]
    return {"accuracy": percent(sum(accuracies), len(accuracies)), "total": len(pairs)}


def score_gqa(pairs: Sequence[tuple[Answer, Label]]) -> dict[str, Any]:
    """The share of answers that are exactly right, but for case and full stops at the end."""
    return _by_kind([(label.kind, float(gqa_prediction(answer.text) == label.answers[0])) for answer, label in pairs])


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

    return Labels(unique(labels()))


def _people(value: Any, where: str) -> Label:
    answers = field(value, "answers", where)
    try:
        return Label(tuple(answer["answer"] for answer in answers), value.get("answer_type", "other"))
    except (TypeError, KeyError) as error:
        raise UserError(f"{where}: its answers are no list of objects with `answer`") from error


def textvqa_labels(paths: Sequence[str], lines: Sequence[Line], asked: Sequence[Question]) -> Labels:
    """By picture and question, since published answers have the picture's id; or by the questions' own ids."""
    keys: dict[str, str] = {}

    def labels() -> Iterator[tuple[str, Label, str]]:
        for path in paths:
            for where, value in listed(read_json(path), "data", path):
                image, question = field(value, "image_id", where), field(value, "question", where)
                answers = field(value, "answers", where)
                key = _picture_and_question(image, question)
                keys[str(value.get("question_id", key))] = key
                yield key, Label(tuple(answers), ""), where

    def key(line: Line) -> str:
        ident = question_id(line)
        return keys.get(ident) or _picture_and_question(ident, textvqa_question(line.get("prompt")))

    return Labels(unique(labels()), key)


def _picture_and_question(image: Any, question: str) -> str:
    return f"{image}: {question.lower().strip()}"


def textvqa_question(prompt: str) -> str:
    """The question in a prompt that has OCR tokens and the format of the answer in lines of their own."""
    apart = ("Reference OCR token:", SHORT)
    return "\n".join(line for line in prompt.split("\n") if not line.startswith(apart))


def gqa_labels(paths: Sequence[str], lines: Sequence[Line], asked: Sequence[Question]) -> Labels:
    def labels() -> Iterator[tuple[str, Label, str]]:
        for path in paths:
            for ident, value in _gqa(path):
                where = f"{path}: question {ident}"
                structure = field(field(value, "types", where), "structural", where)
                kind = "open" if structure == "query" else "binary"
                yield ident, Label((field(value, "answer", where),), kind), where

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
        image = f"COCO_{split}_{field(question, 'image_id', where):012d}.jpg"
        yield Question(field(question, "question_id", where), field(question, "question", where), (image,))


def vizwiz_questions(path: str) -> Iterator[Question]:
    for where, question in listed(read_json(path), "", path):
        image = field(question, "image", where)
        yield Question(image, f"{field(question, 'question', where)}\n{UNANSWERABLE}", (image,))


def textvqa_questions(path: str) -> Iterator[Question]:
    """Without OCR tokens, which the v1.5 release showed: its own file of questions has them."""
    for where, question in listed(read_json(path), "data", path):
        image = field(question, "image_id", where)
        yield Question(image, field(question, "question", where), (f"{image}.jpg",))


def gqa_questions(path: str) -> Iterator[Question]:
    for ident, question in _gqa(path):
        where = f"{path}: question {ident}"
        yield Question(ident, field(question, "question", where), (f"{field(question, 'imageId', where)}.jpg",))


# --------------------------------------------------------------------------------------------------------- submissions


def _array(entries: Sequence[dict[str, Any]]) -> bytes:
    return json.dumps(entries).encode() + b"\n"


def submit_vqav2(lines: Sequence[Line], own: str | None) -> bytes:
    return _array([{"question_id": line.get(*IDS), "answer": submitted(line.get("text"))} for line in lines])


def submit_vizwiz(lines: Sequence[Line], own: str | None) -> bytes:
    return _array([{"image": line.get(*IDS), "answer": submitted(line.get("text"))} for line in lines])


def submit_gqa(lines: Sequence[Line], own: str | None) -> bytes:
    return _array([{"questionId": line.get(*IDS), "prediction": gqa_prediction(line.get("text"))} for line in lines])


VQAV2 = Benchmark(
    "VQAv2: soft accuracy", vqav2_questions, SHORT, labels=vqav2_labels, score=score_challenge, submission=submit_vqav2
)
TEXTVQA = Benchmark("TextVQA: soft accuracy", textvqa_questions, SHORT, labels=textvqa_labels, score=score_textvqa)
VIZWIZ = Benchmark(
    "VizWiz: soft accuracy", vizwiz_questions, SHORT, labels=vizwiz_labels, score=score_challenge,
    submission=submit_vizwiz,
)  # fmt: skip
GQA = Benchmark("GQA: exact answers", gqa_questions, SHORT, labels=gqa_labels, score=score_gqa, submission=submit_gqa)

"""VQAv2, VizWiz and GQA: questions with short answers."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from llava_jax.cli import UserError
from llava_jax.evaluate import dataset_files as files
from llava_jax.evaluate.answers import IDS, Answer, by_key, check_asked, question_id, read_json
from llava_jax.evaluate.benchmark import SHORT, Benchmark, Labels, by_kind, register
from llava_jax.evaluate.label_formats import Entry, entries_by_id, field, listed
from llava_jax.evaluate.lines import Line
from llava_jax.evaluate.questions import Question, read_questions
from llava_jax.evaluate.rule_options import PUNCTUATION
from llava_jax.evaluate.rules import LMMS, OFFICIAL, VLMEVAL, Reading, Rule, plain
from llava_jax.evaluate.vqa_answers import official, soft_accuracy, submitted

UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


class Label(NamedTuple):
    answers: tuple[str, ...]  # of people
    kind: str = ""  # of answer

    @property
    def right(self) -> str:
        """The most frequent answer."""
        return max(self.answers, key=self.answers.count)


def _vqav2_accuracy(answer: str | None, people: Sequence[str]) -> float:
    people = [" ".join(text.split("\n")).replace("\t", " ").strip() for text in people]
    if len(set(people)) > 1:
        answer, people = answer if answer is None else official(answer), [official(text) for text in people]
    return soft_accuracy(answer, people)


def gqa_prediction(text: str) -> str:
    return text.rstrip(".").lower()


def read_vqav2(path: str) -> Iterator[Entry]:
    for where, value in listed(read_json(path), "annotations", path):
        yield Entry(str(field(value, "question_id", where)), _people(value, where), where)


def read_vizwiz(path: str) -> Iterator[Entry]:
    for where, value in listed(read_json(path), "", path):
        yield Entry(str(field(value, "image", where)), _people(value, where), where)


def _image_names(asked: Sequence[Question]) -> dict[str, str]:
    """The file names of the questions' images, by question id."""
    return {str(question.id): PurePath(str(question.images[0])).name for question in asked if question.images}


def _people(value: Any, where: str) -> Label:
    answers = [field(answer, "answer", where, str) for answer in field(value, "answers", where, list)]
    if not answers:
        raise UserError(f"{where}: has no answers of people")
    return Label(tuple(answers), str(value.get("answer_type", "other")))


def read_gqa(path: str) -> Iterator[Entry]:
    for where, ident, value in entries_by_id(path):
        structure = field(field(value, "types", where), "structural", where)
        kind = "open" if structure == "query" else "binary"
        yield Entry(ident, Label((field(value, "answer", where, str),), kind), where)


def _without_punctuation(text: str) -> str:
    return text.lower().translate(PUNCTUATION)


def _trimmed(text: str) -> str:
    return text.strip().lower()


def _exact(what: str, said: Callable[[str], str], right: Callable[[str], str]) -> Rule:
    def read(text: str, label: Label) -> Reading:
        return Reading(float(said(text) == right(label.answers[0])), said(text), what)

    return Rule(f"exact answers {what}", read, plain)


def _array(entries: Sequence[dict[str, Any]]) -> bytes:
    return json.dumps(entries).encode() + b"\n"


def _of_gqa_row(line: Line) -> tuple[list[Label], list[str], str]:
    right, types = files.text(line, "answer"), line.value.get("types")
    structure = types.get("structural") if isinstance(types, dict) else None
    return [Label((right,), "" if structure is None else "open" if structure == "query" else "binary")], [right], ""


@register
class VqaV2(Benchmark):
    name, what = "vqav2", "VQAv2: soft accuracy"
    label_files, entries = "the challenge's annotations", staticmethod(read_vqav2)
    suffix = SHORT
    ids = r"\d+"

    def questions(self, path: str) -> Iterator[Question]:
        """From v2_OpenEnded_mscoco_*_questions.json. Its images are COCO's."""
        value = read_json(path)
        split = str(field(value, "data_subtype", path)).replace("test-dev2015", "test2015")
        for where, question in listed(value, "questions", path):
            image = f"COCO_{split}_{field(question, 'image_id', where, int):012d}.jpg"
            yield Question(field(question, "question_id", where), field(question, "question", where), (image,))

    def score(self, pairs: Sequence[tuple[Answer, Label]]) -> dict[str, Any]:
        """Soft accuracy as the challenge's server computes it for submitted answers: if all people give the same
        answer, texts are compared without normalization."""
        return by_kind(
            [(label.kind, _vqav2_accuracy(answer.read(submitted, None), label.answers)) for answer, label in pairs]
        )

    def submission(self, lines: Sequence[Line], own: str | None) -> bytes:
        """The server wants all questions of its split: those of `own` without an answer get an empty one."""
        answers = by_key(lines, question_id)
        ids = {question_id(line): line.get(*IDS) for line in lines}
        texts = {ids[ident]: submitted(answer.text or "") for ident, answer in answers.items()}
        if own:
            asked = {str(question.id): question.id for question in read_questions([own], "", self.questions)}
            check_asked(answers, asked, own)
            texts |= {ident: "" for key, ident in asked.items() if key not in answers}
        return _array([{"question_id": ident, "answer": answer} for ident, answer in texts.items()])


@register
class VizWiz(Benchmark):
    name, what = "vizwiz", "VizWiz: soft accuracy"
    label_files, entries = VqaV2.label_files, staticmethod(read_vizwiz)
    suffix = SHORT
    ids = r"[^/]+"

    def questions(self, path: str) -> Iterator[Question]:
        for where, question in listed(read_json(path), "", path):
            image = field(question, "image", where)
            yield Question(image, f"{field(question, 'question', where)}\n{UNANSWERABLE}", (image,))

    def labels(self, entries: Sequence[Entry], lines: Sequence[Line], asked: Sequence[Question]) -> Labels:
        """By the names of images, which `asked` gives for other question ids."""
        images = _image_names(asked)
        return Labels(
            super().labels(entries, lines, asked), lambda line: images.get(question_id(line), question_id(line))
        )

    def score(self, pairs: Sequence[tuple[Answer, Label]]) -> dict[str, Any]:
        """Soft accuracy by VizWiz's server, which normalizes the answer but never those of people."""
        return by_kind(
            [
                (label.kind, soft_accuracy(answer.read(lambda text: official(submitted(text)), None), label.answers))
                for answer, label in pairs
            ]
        )

    def submission(self, lines: Sequence[Line], own: str | None) -> bytes:
        """The server knows questions by their images. `own` names them if question ids are others."""
        images = _image_names(read_questions([own], "", self.questions)) if own else {}
        answers = by_key(lines, lambda line: images.get(question_id(line), question_id(line)))
        if own:
            check_asked(answers, dict.fromkeys(images.values()), own)
        if unknown := next((image for image in answers if not PurePath(image).suffix), None):
            where = answers[unknown].where
            raise UserError(f"{where}: {unknown} names no image: --labels with the questions tells which it is")
        return _array([{"image": image, "answer": submitted(answer.text or "")} for image, answer in answers.items()])


@register
class Gqa(Benchmark):
    name, what = "gqa", "GQA: exact answers"
    label_files, entries = "GQA's questions with `answer`", staticmethod(read_gqa)
    of_row = staticmethod(_of_gqa_row)
    suffix = SHORT
    ids = r"[^\W_]{1,10}"
    rules = {
        OFFICIAL: _exact("without case and full stops at the end", gqa_prediction, str),
        LMMS: _exact("without case and punctuation", _without_punctuation, _without_punctuation),
        VLMEVAL: _exact("without case and white space at the ends", _trimmed, _trimmed),
    }

    def questions(self, path: str) -> Iterator[Question]:
        for where, ident, question in entries_by_id(path):
            yield Question(ident, field(question, "question", where), (f"{field(question, 'imageId', where)}.jpg",))

    def score(self, pairs: Sequence[tuple[Answer, Label]]) -> dict[str, Any]:
        """The share of answers that equal the label, ignoring case and full stops at the end."""
        return by_kind(
            [(label.kind, float(answer.read(gqa_prediction, None) == label.answers[0])) for answer, label in pairs]
        )

    def submission(self, lines: Sequence[Line], own: str | None) -> bytes:
        """All answers have to be to questions of `own`, GQA's questions."""
        answers = by_key(lines, question_id)
        if own:
            asked = (str(question.id) for question in read_questions([own], "", self.questions))
            check_asked(answers, dict.fromkeys(asked), own)
        predictions = {ident: gqa_prediction(answer.text or "") for ident, answer in answers.items()}
        return _array([{"questionId": ident, "prediction": text} for ident, text in predictions.items()])

"""The easy-VQA data set as LLaVA JSON.

easy-VQA (Zhou 2019) shows one shape in one colour on an image of 64 x 64 pixels, 4,000 to train on and 1,000 to test,
and asks about ten questions an image with one of 13 answers.
"""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import easy_vqa

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
IMAGES = Path(easy_vqa.__file__).parent / "data"  # of both splits, as in "train/images/7.png"


class Question(NamedTuple):
    text: str
    answer: str


class AskedImage(NamedTuple):
    """An image and what is asked about it."""

    name: str  # relative to IMAGES
    questions: tuple[Question, ...]


def asked_images(split: str) -> list[AskedImage]:
    """The images of "train" or "test" with their questions, in the data set's order."""
    questions, answers, indices = getattr(easy_vqa, f"get_{split}_questions")()
    asked: dict[int, list[Question]] = {}
    for question, answer, index in zip(questions, answers, indices, strict=True):
        asked.setdefault(index, []).append(Question(question, answer))
    return [AskedImage(f"{split}/images/{index}.png", tuple(asked[index])) for index in sorted(asked)]


def facts(image: AskedImage) -> tuple[str | None, str | None]:
    """Shape and colour, as far as questions and answers tell."""
    found = []
    for values in (SHAPES, COLOURS):
        told = {value for question in image.questions for value in _told(question, values)}
        excluded = {value for question in image.questions for value in _excluded(question, values)}
        left = told or set(values) - excluded
        found.append(left.pop() if len(left) == 1 else None)
    return tuple(found)


def caption(image: AskedImage) -> str | None:
    """`a red circle`; None where the questions do not tell both."""
    shape, colour = facts(image)
    return f"a {colour} {shape}" if shape and colour else None


def _told(question: Question, values: tuple[str, ...]) -> Iterator[str]:
    """What an answer says it is: the answer itself, what an open question takes for granted, what is affirmed."""
    if question.answer in values:
        yield question.answer
    mentioned = _mentioned(question.text, values)
    if mentioned and (question.answer not in ("yes", "no") or _affirms(question)):
        yield mentioned


def _excluded(question: Question, values: tuple[str, ...]) -> Iterator[str]:
    mentioned = _mentioned(question.text, values)
    if mentioned and question.answer in ("yes", "no") and not _affirms(question):
        yield mentioned


def _affirms(question: Question) -> bool:
    negated = bool({"not", "no"}.intersection(_words(question.text)))
    return (question.answer == "yes") != negated


def _mentioned(text: str, values: tuple[str, ...]) -> str | None:
    return next((word for word in _words(text) if word in values), None)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def write(directory: Path, seed: int = 0) -> None:
    """Writes `captions.json` (stage 1), `conversations.json` (stage 2) and `questions.json` (test).

    Turns are shuffled, so that no answer can be copied from the place where it usually stands.
    """
    directory.mkdir(parents=True, exist_ok=True)
    order = random.Random(seed)
    train = asked_images("train")
    captions = [(image, [Question("Describe the image briefly.", text)]) for image in train if (text := caption(image))]
    shuffled = [(image, order.sample(image.questions, len(image.questions))) for image in train]
    single = [(image, [question]) for image in asked_images("test") for question in image.questions]
    for name, samples in (("captions", captions), ("conversations", shuffled), ("questions", single)):
        lines = [_sample(i, image, questions) for i, (image, questions) in enumerate(samples)]
        (directory / f"{name}.json").write_text(json.dumps(lines, indent=1))


def _sample(number: int, image: AskedImage, questions: list[Question]) -> dict:
    turns = []
    for question in questions:
        mark = "" if turns else "<image>\n"
        turns.append({"from": "human", "value": mark + question.text})
        turns.append({"from": "gpt", "value": question.answer})
    return {"id": f"{Path(image.name).stem}-{number}", "image": image.name, "conversations": turns}

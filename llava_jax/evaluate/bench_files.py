"""The files of LLaVA-Bench: questions, descriptions of their pictures, answers; joined by question id and by picture.

Questions have `question_id`, `image`, `text` and `category`. Descriptions are of a picture (`image`): of COCO's
`captions` and `instances` (`category`, `bbox`), of those in the wild a `caption`. Answers have `question_id`, `text`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from llava_jax.cli import UserError
from llava_jax.evaluate.answers import answer_of, refuse_questions
from llava_jax.evaluate.lines import Line, once, read_lines

WILD_PREFIX = "llava_bench_"  # of categories in reviews of answers in the wild


class Question(NamedTuple):
    question_id: Any  # as it stands in the file
    category: str  # with the prefix, where its picture is one in the wild
    text: str
    context: str  # the picture in words
    image: str


class Answer(NamedTuple):
    answer_id: Any
    model_id: str | None
    text: str | None  # without its thinking; None where there is no answer
    absent: str = ""  # why there is none


def read_questions(questions: str, contexts: str) -> dict[str, Question]:
    """The questions by id. Raises `UserError` for one that is there in two ways, or whose picture has no
    description."""
    described = read_contexts(contexts)

    def asked() -> Iterator[tuple[str, Question, str]]:
        for line in read_lines(questions):
            ident, image = line.text("question_id"), line.text("image")
            if image not in described:
                raise UserError(f"{line.where}: question {ident}: {contexts} has no description of its picture {image}")
            context, prefix = described[image]
            category = prefix + line.text("category")
            yield ident, Question(line.get("question_id"), category, line.text("text"), context, image), line.where

    found = once(asked(), "question {key} stands there for the second time, with other content")
    if not found:
        raise UserError(f"{questions}: holds no questions")
    return {ident: question for ident, (question, _) in found.items()}


def read_contexts(path: str) -> dict[str, tuple[str, str]]:
    """By picture: its description, and the prefix of the categories of its questions."""
    lines = ((line.text("image"), _description(line), line.where) for line in read_lines(path))
    found = once(lines, "picture {key} has another description before", what="picture")
    return {image: description for image, (description, _) in found.items()}


def _description(line: Line) -> tuple[str, str]:
    if "captions" not in line.value:
        return _text(line, "caption"), WILD_PREFIX
    instances = line.value.get("instances", [])
    if not isinstance(instances, list):
        raise UserError(f"{line.where}: its instances are no list")
    boxes = "\n".join(_box(line, instance) for instance in instances)
    return f"{_text(line, 'captions')}\n\n{boxes}", ""


def _text(line: Line, name: str) -> str:
    value = line.get(name)
    if not isinstance(value, str | list):
        raise UserError(f"{line.where}: its {name} is neither a text nor a list of them")
    return value if isinstance(value, str) else "\n".join(map(str, value))


def _box(line: Line, instance: Any) -> str:
    try:
        return f"{instance['category']}: {instance['bbox']}"
    except (LookupError, TypeError) as error:
        raise UserError(f"{line.where}: an instance has no category or no bbox: {instance}") from error


def read_answers(path: str, questions: dict[str, Any]) -> dict[str, Answer]:
    """The answers by question id: one to each question. Raises `UserError` for two different ones, or too few."""
    lines = {line.where: line for line in read_lines(path)}
    refuse_questions(list(lines.values()))

    def said() -> Iterator[tuple[str, tuple[str | None, str], str]]:
        for where, line in lines.items():
            ident, answer = line.text("question_id"), answer_of(line, ("text",))
            if ident not in questions:
                raise UserError(f"{where}: question {ident} is none of the {len(questions)} questions")
            yield ident, (answer.text, answer.absent), where

    answers: dict[str, Answer] = {}
    for ident, (answer, where) in once(said(), "question {key} has an answer already, another one").items():
        line = lines[where].value
        answers[ident] = Answer(line.get("answer_id", ident), line.get("model_id"), *answer)
    if missing := [ident for ident in questions if ident not in answers]:
        raise UserError(
            f"{path}: has no answer to {len(missing)} of {len(questions)} questions, {missing[0]} the first"
        )
    return answers

"""The files of LLaVA-Bench: questions, descriptions of their images, and answers, joined by question id and by image.

Questions have `question_id`, `image`, `text` and `category`. Descriptions have `image` and either COCO's `captions` and
`instances` (`category`, `bbox`), or a `caption` (In-the-Wild). Answers have `question_id` and `text`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from llava_jax.cli import UserError
from llava_jax.evaluate.answers import by_key, join, refuse_questions
from llava_jax.evaluate.lines import Line, once, read_lines

WILD_PREFIX = "llava_bench_"  # of the categories of In-the-Wild in reviews


class Question(NamedTuple):
    question_id: Any  # as it is in the file
    category: str  # with the prefix if its image is of In-the-Wild
    text: str
    context: str  # a description of the image


class Answer(NamedTuple):
    answer_id: Any
    model_id: str | None
    text: str | None  # without its thinking; None if there is no answer
    absent: str = ""  # the reason why there is no answer


def read_questions(questions: str, contexts: str) -> dict[str, Question]:
    """The questions by id. Raises `UserError` for two different ones with an id, and for an image without a
    description."""
    described = read_contexts(contexts)

    def asked() -> Iterator[tuple[str, Question, str]]:
        for line in read_lines(questions):
            ident, image = line.text("question_id"), line.text("image")
            if image not in described:
                raise UserError(f"{line.where}: question {ident}: {contexts} has no description of its image {image}")
            context, prefix = described[image]
            category = prefix + line.text("category")
            yield ident, Question(line.get("question_id"), category, line.text("text"), context), line.where

    found = once(asked(), "question {key} is there a second time, with other content")
    if not found:
        raise UserError(f"{questions}: holds no questions")
    return {ident: question for ident, (question, _) in found.items()}


def read_contexts(path: str) -> dict[str, tuple[str, str]]:
    """By image: its description, and the prefix of the categories of its questions."""
    lines = ((line.text("image"), _description(line), line.where) for line in read_lines(path))
    found = once(lines, "image {key} has another description before", what="image")
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
        raise UserError(f"{line.where}: its {name} is neither a text nor a list of texts")
    return value if isinstance(value, str) else "\n".join(map(str, value))


def _box(line: Line, instance: Any) -> str:
    try:
        return f"{instance['category']}: {instance['bbox']}"
    except (LookupError, TypeError) as error:
        raise UserError(f"{line.where}: an instance has no category or no bbox: {instance}") from error


def read_answers(path: str, questions: dict[str, Any]) -> dict[str, Answer]:
    """The answers by question id. Raises `UserError` unless each question has exactly one."""
    lines = {line.where: line for line in read_lines(path)}
    refuse_questions(list(lines.values()))
    found = by_key(list(lines.values()), lambda line: line.text("question_id"), ("text",))
    join(found, questions, path)
    own = {ident: (found[ident], lines[found[ident].where].value) for ident in questions}
    return {
        ident: Answer(line.get("answer_id", ident), line.get("model_id"), answer.text, answer.absent)
        for ident, (answer, line) in own.items()
    }


def read_by_id(path: str | None) -> dict[str, Line]:
    """The lines of a file by `question_id`; none without a file. Raises `UserError` for two different ones with an
    id."""
    lines = ((line.text("question_id"), line.value, line.where) for line in (read_lines(path) if path else ()))
    found = once(lines, "question {key} is there a second time, with other content")
    return {ident: Line(where, value) for ident, (value, where) in found.items()}

"""The files of LLaVA-Bench: questions, descriptions of their pictures, answers; joined by question id and by picture.

Questions have `question_id`, `image`, `text` and `category`. Descriptions are of a picture (`image`): of COCO's
`captions` and `instances` (`category`, `bbox`), of those in the wild a `caption`. Answers have `question_id`, `text`.
"""

from typing import Any, NamedTuple

from llava_jax.cli import UserError
from llava_jax.evaluate.answers import answer_of
from llava_jax.evaluate.lines import Line, read_lines

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
    """The questions by id. Raises `UserError` for one that is there twice, or whose picture has no description."""
    described = read_contexts(contexts)
    result: dict[str, Question] = {}
    for line in read_lines(questions):
        ident, image = str(line.get("question_id")), str(line.get("image"))
        if ident in result:
            raise UserError(f"{line.where}: question {ident} stands there for the second time")
        if image not in described:
            raise UserError(f"{line.where}: question {ident}: {contexts} has no description of its picture {image}")
        context, prefix = described[image]
        category = prefix + str(line.get("category"))
        result[ident] = Question(line.get("question_id"), category, str(line.get("text")), context, image)
    if not result:
        raise UserError(f"{questions}: holds no questions")
    return result


def read_contexts(path: str) -> dict[str, tuple[str, str]]:
    """By picture: its description, and the prefix of the categories of its questions."""
    described = {}
    for line in read_lines(path):
        if "captions" in line.value:
            instances = line.value.get("instances", [])
            if not isinstance(instances, list):
                raise UserError(f"{line.where}: its instances are no list")
            boxes = "\n".join(_box(line, instance) for instance in instances)
            described[str(line.get("image"))] = (f"{_text(line, 'captions')}\n\n{boxes}", "")
        else:
            described[str(line.get("image"))] = (_text(line, "caption"), WILD_PREFIX)
    return described


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
    """The answers by question id: one to each question. Raises `UserError` for one too many or too few."""
    answers: dict[str, Answer] = {}
    for line in read_lines(path):
        ident = str(line.get("question_id"))
        if ident not in questions:
            raise UserError(f"{line.where}: question {ident} is none of the {len(questions)} questions")
        if ident in answers:
            raise UserError(f"{line.where}: question {ident} has an answer already")
        said = answer_of(line, ("text",))
        answers[ident] = Answer(line.value.get("answer_id", ident), line.value.get("model_id"), said.text, said.absent)
    if missing := [ident for ident in questions if ident not in answers]:
        raise UserError(
            f"{path}: has no answer to {len(missing)} of {len(questions)} questions, {missing[0]} the first"
        )
    return answers

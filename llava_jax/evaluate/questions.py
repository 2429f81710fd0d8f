"""The questions of a benchmark, from files of a common form or of the benchmark's own."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath

from llava_jax.cli import UserError
from llava_jax.evaluate.answers import is_lines, read_json
from llava_jax.evaluate.lines import Line, once, read_lines

MARK = "<image>"

Key = tuple[str, str, str, int]


class Question(NamedTuple):
    """What a model is asked."""

    id: Any  # as it stands in the file
    text: str  # without marks of pictures
    pictures: tuple[str | bytes, ...] = ()  # names below the folder of pictures, or what is in their files
    extra: dict[str, Any] = {}  # what goes into the line of the answer, besides

    @property
    def key(self) -> Key:
        """What tells it from others: ids alone repeat where a benchmark's are those of its pictures or files."""
        return key_of({"question_id": self.id, "prompt": self.text, **self.extra})


def key_of(answer: dict[str, Any]) -> Key:
    """The key of the question that a line answers."""
    return str(answer["question_id"]), answer["prompt"], str(answer.get("category", "")), answer.get("round_id", 0)


def read_questions(
    paths: Sequence[str], suffix: str, own: Callable[[str], Iterable[Question]] | None = None
) -> list[Question]:
    """The questions of all files, each followed by `suffix` if it does not end with it.

    A file is JSONL of `question_id`, `image` and `text`; LLaVA JSON, of which the first turns are asked; or what `own`
    reads. Those of several files have the file's name as their category, if they have none.

    A question that is there again word for word is asked once. Raises `UserError` where a file has another form, or a
    question is there again about other pictures.
    """

    def asked() -> Iterator[tuple[Key, Question, str]]:
        for path in paths:
            category = {"category": epath.Path(path).stem} if len(paths) > 1 else {}
            for number, question in enumerate(_read(path, own), 1):
                whole = question._replace(text=_with_suffix(question.text, suffix), extra=category | question.extra)
                yield whole.key, whole, f"{path}: question number {number}"

    found = once(asked(), "question {key} is there twice, with other pictures", name=lambda key: key[0])
    if not found:
        raise UserError(f"{paths[0]}: holds no questions")
    return [question for question, _ in found.values()]


def _read(path: str, own: Callable[[str], Iterable[Question]] | None) -> Iterable[Question]:
    if epath.Path(path).suffix not in (".json", ".jsonl") and own:
        return own(path)
    if is_lines(path):
        return [_of_line(line) for line in read_lines(path)]
    value = read_json(path)
    if isinstance(value, list) and value and isinstance(value[0], dict) and "conversations" in value[0]:
        return [_of_sample(sample, f"{path}: element {number}") for number, sample in enumerate(value)]
    if own is None:
        raise UserError(f"{path}: is neither JSONL of question_id, image and text, nor LLaVA JSON")
    return own(path)


def _of_line(line: Line) -> Question:
    text = line.get("text", "question")
    if not isinstance(text, str):
        raise UserError(f"{line.where}: the text of question {line.get('question_id')} is no text")
    image = line.value.get("image")
    extra = {"category": line.value["category"]} if "category" in line.value else {}
    return Question(line.get("question_id", "id"), unmarked(text), (image,) if image else (), extra)


def _of_sample(sample: Any, where: str) -> Question:
    try:
        images = sample.get("image") or ()
        text = sample["conversations"][0]["value"]
        return Question(sample["id"], unmarked(text), (images,) if isinstance(images, str) else tuple(images))
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: is no sample of LLaVA JSON: {json.dumps(sample)[:60]}") from error


def marked(question: Question, picture_last: bool = False) -> str:
    """Its text with a mark for each picture, before it as in training, or after it."""
    marks = [MARK] * len(question.pictures)
    return "\n".join([question.text, *marks] if picture_last else [*marks, question.text])


def unmarked(text: str) -> str:
    """Without marks and the white space beside them; a text without marks stays as it is."""
    return text.replace(MARK, "").strip() if MARK in text else text


def _with_suffix(text: str, suffix: str) -> str:
    return text if not suffix or text.endswith(suffix) else f"{text}\n{suffix}"

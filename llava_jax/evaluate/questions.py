"""The questions of a benchmark, from files in a common format or in the benchmark's own."""

import base64
import collections
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import PIL.Image
from etils import epath

from llava_jax.cli import UserError, short, warn
from llava_jax.data.image_folder import image_path
from llava_jax.data.images import decode_image, read_image
from llava_jax.data.records import Record, local_data, scan
from llava_jax.data.samples import Fault, image_names, parse_sample, record_value, system_prompt
from llava_jax.data.templates import IMAGE_TOKEN as MARK
from llava_jax.data.unsupported import foreign_mark, unread_keys, unread_texts
from llava_jax.evaluate.answers import is_lines, read_json
from llava_jax.evaluate.dataset_files import Image
from llava_jax.evaluate.lines import Line, once
from llava_jax.evaluate.parquet import content
from llava_jax.files.reading import refuse_pointer

Key = tuple[str, str, str, int]
Read = TypeVar("Read")


class Question(NamedTuple):
    """A question to a model.

    `text` is without `<image>`. `marked_text` is the text with its `<image>`s if the file has them elsewhere than in
    lines before the text.
    """

    id: Any  # as it is in the file
    text: str
    images: tuple[Image, ...] = ()  # names relative to the folder of images, or the content of image files
    extra: dict[str, Any] = {}  # further fields of the answer's line
    marked_text: str = ""
    system: str = ""  # the system prompt; "" for the template's own

    @property
    def key(self) -> Key:
        """Identifies the question: ids alone may repeat, if they are those of images, or in several files."""
        return key_of({"question_id": self.id, "prompt": self.text, **self.extra})


def key_of(answer: dict[str, Any]) -> Key:
    """The key of the question that a line of answers belongs to."""
    return str(answer["question_id"]), answer["prompt"], str(answer.get("category", "")), answer.get("round_id", 0)


def read_questions(
    paths: Sequence[str], suffix: str, own: Callable[[str], Iterable[Question]] | None = None
) -> list[Question]:
    """The questions of all files, each followed by `suffix` if it does not end with it.

    A file is JSONL (or an array) of `question_id`, `image` and `text`; LLaVA JSON, whose first questions are asked; or
    in the format that `own` reads. With several files, questions without a category get the file's name.

    A repeated question is asked once. Raises `UserError` for a file in another format, and for a repeated question with
    other images or another system prompt.
    """

    def asked() -> Iterator[tuple[Key, Question, str]]:
        for path in paths:
            category = {"category": epath.Path(path).stem} if len(paths) > 1 else {}
            for number, question in enumerate(_read(path, own), 1):
                whole = question._replace(
                    text=_with_suffix(question.text, suffix),
                    marked_text=question.marked_text and _with_suffix(question.marked_text, suffix),
                    extra=category | question.extra,
                )
                yield whole.key, whole, f"{path}: question number {number}"

    found = once(asked(), "question {key} is there twice, with other images or system prompt", name=lambda key: key[0])
    if not found:
        raise UserError(f"{paths[0]}: holds no questions")
    return [question for question, _ in found.values()]


def _read(path: str, own: Callable[[str], Iterable[Question]] | None) -> Iterable[Question]:
    if own and (epath.Path(path).suffix not in (".json", ".jsonl") or not _is_common(path)):
        return own(path)
    return _common(path)


def _common(path: str) -> Iterator[Question]:
    """The questions of a file in one of the common formats. Warns of texts that are not used."""
    unread = collections.Counter()
    for record in scan(local_data(path), path):
        yield (question := _question(record))
        texts = [question.text, marked(question), question.marked_text, question.system]
        unread.update(unread_texts(record_value(record), texts))
    if unread:
        keys = ", ".join(f"`{short(key)}` ({count:,})" for key, count in unread.items())
        warn(f"{path}: {keys} beside the text of questions is not read, and no text says the same")


def _is_common(path: str) -> bool:
    """Whether a file has one of the common formats."""
    if is_lines(path):
        return True
    value = read_json(path)
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and not {"conversations", "messages", "text"}.isdisjoint(first)


def _question(record: Record) -> Question:
    """The question in a record: a line of questions, or a sample."""
    value = record_value(record)
    keys = set(value) if isinstance(value, dict) else set()
    if keys & {"text", "question", "question_id"} and not keys & {"conversations", "messages"}:
        return _of_line(Line(record.where, value))
    sample = parse_sample(record)
    system = next((text for role, text in sample.turns if role == "system"), "")
    text = next((text for role, text in sample.turns if role == "user"), None)
    if text is None:
        raise UserError(f"{record.where} (id {sample.id}): has no question")
    images = sample.images[: text.count(MARK)]
    ident = value.get("id")
    return _placed(Question(record.index if ident is None else ident, text, images, system=system))


def _of_line(line: Line) -> Question:
    """The question in a line. Its text has an `<image>` for each image, or none; images then come first."""
    ident, text = line.get("question_id", "id"), line.get("text", "question")
    where = f"{line.where}: question {ident}"
    if not isinstance(text, str):
        raise UserError(f"{where}: its text is no text but {json.dumps(text)[:40]}")
    images, system = image_names(line.value), system_prompt(line.value)
    for fault in (images, system):
        if isinstance(fault, Fault):
            raise UserError(f"{where}: {fault.detail}")
    for detail in unread_keys(line.value, bool(images)):
        raise UserError(f"{where}: {detail}")
    if foreign := foreign_mark(text, question=True):
        raise UserError(f"{where}: its text holds {foreign}, which marks nothing here: {MARK} is read")
    marks = text.count(MARK)
    if marks not in (0, len(images)):
        raise UserError(f"{where}: {marks} {MARK} in the text, but {len(images)} images: there has to be one for each")
    extra = {"category": line.value["category"]} if "category" in line.value else {}
    return _placed(Question(ident, text, images, extra, system=system))


def _placed(question: Question) -> Question:
    """The question with `text` and `marked_text` from a text with marks."""
    bare = question._replace(text=unmarked(question.text))
    usual = MARK not in question.text or marked(bare) == question.text
    return bare if usual else bare._replace(marked_text=question.text)


def marked(question: Question, image_last: bool = False, image_position: str = "first") -> str:
    """The text with an `<image>` for each image: before it, after it with `image_last`, or, if `image_position` is
    `as_is`, in the places that the file has."""
    marks = [MARK] * len(question.images)
    if image_last:
        return "\n".join([question.text, *marks])
    in_place = question.marked_text if image_position == "as_is" else ""
    return in_place or "\n".join([*marks, question.text])


def unmarked(text: str) -> str:
    """The text without `<image>`s and the white space around it; a text without `<image>` stays as it is."""
    return text.replace(MARK, "").strip() if MARK in text else text


def read_images(question: Question, folder: epath.PathLike, read: Callable[[Any], Read]) -> list[Read]:
    """`read(image or path)` for each of the question's images. Its errors and those of names get the question's id."""
    try:
        return [
            read(image_path(folder, image) if isinstance(image, str) else decode_image(content(image)))
            for image in question.images
        ]
    except UserError as error:
        raise UserError(f"question {question.id}: {error}") from error


def data_url(image: Image, folder: epath.PathLike = "") -> str:
    """An image as the URL that APIs take. Raises `UserError` if it cannot be read."""
    name = image if isinstance(image, str) else "in the file"
    data = read_image(image_path(folder, image)) if isinstance(image, str) else content(image)
    refuse_pointer(data, f"image {name}")
    try:
        kind = PIL.Image.open(io.BytesIO(data)).get_format_mimetype()
    except PIL.UnidentifiedImageError as error:
        raise UserError(f"image {name}: is no image that can be read") from error
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def system_turns(question: Question) -> list[tuple[str, str]]:
    """The turn with the question's system prompt, if it has one."""
    return [("system", question.system)] if question.system else []


def request_turns(question: Question, image_last: bool = False, image_position: str = "first") -> list[tuple[str, str]]:
    """The turns (role, text) of a request: the system prompt, if there is one, and the question; see `marked`."""
    return [*system_turns(question), ("user", marked(question, image_last, image_position))]


def _with_suffix(text: str, suffix: str) -> str:
    return text if not suffix or text.endswith(suffix) else f"{text}\n{suffix}"

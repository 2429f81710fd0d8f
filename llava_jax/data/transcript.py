"""Saves a conversation of the chat as LLaVA JSON, and loads it.

`data.check` finds the file clean, and training reads it. `system` is the system prompt if it was not the template's; an
empty one, for no system prompt, only has a meaning for the chat.
"""

import json
import os
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

from etils import epath

from llava_jax.cli import UserError
from llava_jax.data.image_folder import ImageFolder, image_path
from llava_jax.data.records import local_data, scan
from llava_jax.data.samples import conversation, parse_sample, record_value
from llava_jax.data.templates import IMAGE_TOKEN
from llava_jax.files.writing import atomic_file
from llava_jax.remote import is_remote


class Transcript(NamedTuple):
    """Turns of user and assistant, an image name for each `<image>` in them, and the system prompt if there was one."""

    turns: Sequence[tuple[str, str]]
    images: Sequence[str] = ()
    system: str | None = None


def unmarked(text: str) -> str:
    """A text without marks, which would add images."""
    return text.replace(IMAGE_TOKEN, "")


def marked(text: str, images: int) -> str:
    """The text of a question with a mark for each of its images. Missing marks are added before the text.

    Raises `UserError` if the text has more marks than there are images.
    """
    placed = text.count(IMAGE_TOKEN)
    if placed > images:
        raise UserError(
            f"{placed} {IMAGE_TOKEN} in the message, but {images} images for it: attach one for each, or write "
            "something else for the mark"
        )
    return f"{IMAGE_TOKEN}\n" * (images - placed) + text


def absolute_path(file: str) -> epath.Path:
    """Of a file that the user named, local or remote."""
    path = epath.Path(file).expanduser()
    return path if is_remote(path) else epath.Path(os.path.abspath(path))


def dump(transcript: Transcript, ident: str) -> str:
    """The JSON text: an array of one sample."""
    sample: dict[str, Any] = {"id": ident}
    if transcript.images:
        sample["image"] = transcript.images[0] if len(transcript.images) == 1 else list(transcript.images)
    if transcript.system is not None:
        sample["system"] = transcript.system
    sample["conversations"] = conversation(transcript.turns)
    return json.dumps([sample], ensure_ascii=False, indent=2) + "\n"


def save(path: epath.Path, transcript: Transcript) -> None:
    """Writes a conversation, whose `id` is the name of the file. Only another conversation is replaced.

    Raises `UserError`.
    """
    if not transcript.turns:
        raise UserError("there is nothing to save yet: nothing has been answered")
    if path.exists():
        try:
            load(path)
        except UserError as error:
            raise UserError(f"{path} exists and is no saved conversation: choose another name") from error
    with atomic_file(path) as file:
        file.write(dump(transcript, path.stem).encode())


def load(path: epath.Path, allow_absolute: bool = True) -> Transcript:
    """Reads the conversation in a file. Image names are relative to its folder, or absolute if that is allowed.

    Raises `UserError`.
    """
    records = list(islice(scan(local_data(path), path), 2))
    if len(records) != 1:
        raise UserError(f"{path}: holds more than one sample: one conversation was expected")
    sample, system = parse_sample(records[0]), record_value(records[0]).get("system")
    turns = sample.turns
    if turns and turns[0][0] == "system":
        (_, system), *turns = turns
    if len(turns) % 2:
        raise UserError(f"{path}: ends with a question that has no answer: remove it")
    folder = ImageFolder(path.parent, allow_absolute)
    try:
        images = [str(image_path(folder, name)) for name in sample.images]
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return Transcript(tuple(turns), images, system)

"""A conversation that was had, as a sample of LLaVA's JSON, and back.

It is one that `data.check` finds clean and that training takes. `system` is the system prompt, where the conversation
had another than the template's; an empty one, for none, is for the chat alone.
"""

import json
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

from etils import epath

from llava_jax.cli import UserError
from llava_jax.data.conversation import IMAGE_TOKEN
from llava_jax.data.image_folder import ImageFolder, image_path
from llava_jax.data.records import local_data, scan
from llava_jax.data.samples import parse_sample, record_value
from llava_jax.files.writing import atomic_file

SPEAKERS = {"user": "human", "assistant": "gpt"}


class Transcript(NamedTuple):
    """Turns of user and assistant, an image name for each `<image>` in them, and the system prompt if there was one."""

    turns: Sequence[tuple[str, str]]
    images: Sequence[str] = ()
    system: str | None = None


def unmarked(text: str) -> str:
    """A text without what would stand for one more image."""
    return text.replace(IMAGE_TOKEN, "")


def marked(text: str, images: int) -> str:
    """A question's text with a mark for each of its images: marks in the text keep their places, the rest go before it.

    Raises `UserError` where the text has more marks than there are images.
    """
    placed = text.count(IMAGE_TOKEN)
    if placed > images:
        raise UserError(
            f"{placed} {IMAGE_TOKEN} in the message, but {images} images for it: attach one for each, or write "
            "something else for the mark"
        )
    return f"{IMAGE_TOKEN}\n" * (images - placed) + text


def dump(transcript: Transcript, ident: str) -> str:
    """The JSON text: an array of one sample."""
    sample: dict[str, Any] = {"id": ident}
    if transcript.images:
        sample["image"] = transcript.images[0] if len(transcript.images) == 1 else list(transcript.images)
    if transcript.system is not None:
        sample["system"] = transcript.system
    sample["conversations"] = [{"from": SPEAKERS[role], "value": text} for role, text in transcript.turns]
    return json.dumps([sample], ensure_ascii=False, indent=2) + "\n"


def save(path: epath.Path, transcript: Transcript) -> None:
    """Writes it to a file named in its `id`. Never over anything but another conversation. Raises `UserError`."""
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
    """The one conversation in a file; names of images are relative to its folder, or absolute where that is allowed.
    Raises `UserError`."""
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

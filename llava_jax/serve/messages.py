"""The messages that the web page shows, as a request to the engine and as a conversation to keep.

A message is a dict as Gradio's Chatbot takes and gives it: `role`, and `content`, a list of parts, pictures first.
"""

import mimetypes
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_jax.data.prompts import Picture
from llava_jax.generate import Request
from llava_jax.transcript import Transcript, dump, marked, unmarked

Message = dict[str, Any]


def question(text: str, files: Sequence[str]) -> Message:
    pictures = [{"type": "file", "file": {"path": file, "mime_type": mimetypes.guess_type(file)[0]}} for file in files]
    return {"role": "user", "content": [*pictures, *([_text_part(text)] if text else [])]}


def answer(text: str) -> Message:
    return {"role": "assistant", "content": [_text_part(text)]}


def text_of(message: Message) -> str:
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def files_of(message: Message) -> list[str]:
    return [part["file"]["path"] for part in message["content"] if part["type"] == "file"]


def answered(messages: Sequence[Message]) -> list[Message]:
    """The messages without a last question that has no answer, as one whose answer was stopped at once."""
    return list(messages[:-1] if messages and messages[-1]["role"] == "user" else messages)


def all_files(messages: Sequence[Message]) -> list[str]:
    """The file of each picture, in their order."""
    return [file for message in messages for file in files_of(message)]


def to_request(messages: Sequence[Message], pictures: Mapping[str, Picture]) -> Request:
    """The request of which the last message is the question, with the picture of each file."""
    return Request(_turns(messages), [pictures[file] for file in all_files(messages)])


def write_zip(messages: Sequence[Message], file: Path) -> None:
    """A conversation as LLaVA JSON, `conversation.json`, with its pictures beside it."""
    pictures = all_files(messages)
    numbers = {picture: i for i, picture in enumerate(dict.fromkeys(pictures), 1)}
    names = {picture: f"{i}{Path(picture).suffix.lower()}" for picture, i in numbers.items()}
    transcript = Transcript(_turns(messages), [names[picture] for picture in pictures])
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("conversation.json", dump(transcript, file.stem))
        for picture, name in names.items():
            archive.write(picture, name)


def _turns(messages: Sequence[Message]) -> list[tuple[str, str]]:
    return [(message["role"], marked(unmarked(text_of(message)), len(files_of(message)))) for message in messages]


def _text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": unmarked(text)}

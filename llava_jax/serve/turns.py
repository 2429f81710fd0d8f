"""Turns the messages of a request into the turns that the model was trained on, and the start of the answer."""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from llava_jax.data.conversation import join_parts
from llava_jax.data.templates import IM_END_TOKEN, IM_START_TOKEN, IMAGE_TOKEN, Template, stop_strings
from llava_jax.serve.errors import ApiError
from llava_jax.serve.schema import Message, Part, TextPart
from llava_jax.serve.tools import MARKS, Tools


class Turns(NamedTuple):
    """(role, text) as `inference.requests.Request` takes them, and (field of the request, URL) of each image."""

    turns: list[tuple[str, str]]
    urls: list[tuple[str, str]]
    begun: str = ""  # the text that the answer continues, of a last message of the assistant


class Marks:
    """Marks that a client's text must not contain, since they would stand for an image, a turn's end or a role."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template, tools: bool = False):
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        marks = {
            IMAGE_TOKEN,
            IM_START_TOKEN,
            IM_END_TOKEN,
            *special,
            *stop_strings(template),
            *(MARKS if tools else ()),
        }
        any_mark = "|".join(re.escape(mark) for mark in marks if mark.strip())
        self._beginning = re.compile(f"(?={any_mark}).", re.DOTALL)

    def disarm(self, text: str) -> str:
        """Inserts a space into every mark: `< image>`. Removing marks could make new ones from the rest."""
        return self._beginning.sub(r"\g<0> ", text)


def read_messages(
    messages: Sequence[Message], marks: Marks, interleaved: bool = False, tools: Tools | None = None
) -> Turns:
    """Converts messages to turns. Consecutive messages of one role become one turn.

    Args:
      messages: of the request.
      marks: that texts must not contain.
      interleaved: whether images keep their places among the texts, for models that were trained so; otherwise they
        come before the text of their turn.
      tools: their format, if messages have calls or results.

    Raises `ApiError` unless the messages alternate and the first is the user's.
    """
    turns, urls = [], []
    for role, group in itertools.groupby(enumerate(messages), key=lambda item: _role(item[1], tools)):
        parts, images = [], []
        for i, message in group:
            if role == "system" and i:
                field = f"messages.{i}.role"
                raise ApiError(400, f"{field}: a system message has to be the first", "invalid_value", field)
            for field, part in parts_of(message, f"messages.{i}.content"):
                if isinstance(part, TextPart):
                    text = marks.disarm(part.text)
                    parts += [tools.result(text) if message.role == "tool" else text] if text else []
                else:
                    parts.append(IMAGE_TOKEN)
                    images.append((f"{field}.image_url.url", part.image_url.url))
            for number, call in enumerate(getattr(message, "tool_calls", None) or ()):
                parts.append(tools.call(call.function, f"messages.{i}.tool_calls.{number}", marks))
        turns.append((role, join_parts(parts) if interleaved else "\n".join(sorted(parts, key=_is_text))))
        urls += images
    if next((role for role, _ in turns if role != "system"), None) != "user":
        what = "messages: the first, but for a system message, has to be the user's"
        raise ApiError(400, what, "invalid_value", "messages")
    begun = turns.pop()[1] if turns[-1][0] == "assistant" else ""
    return Turns(turns, urls, begun)


def _is_text(part: str) -> bool:
    return part != IMAGE_TOKEN  # no text is equal to it: it would be disarmed


def _role(message: Message, tools: Tools | None) -> str:
    return {"developer": "system", "tool": tools and tools.role}.get(message.role, message.role)


def parts_of(message: Message, field: str = "") -> Iterator[tuple[str, Part]]:
    """(field of the request, part) of a message."""
    if isinstance(message.content, str):
        yield field, TextPart(type="text", text=message.content)
    else:
        for i, part in enumerate(message.content or ()):
            yield f"{field}.{i}", part

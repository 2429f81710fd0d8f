"""What requests cost: token counts estimated without a tokenizer, and prices."""

import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

Message = dict[str, Any]  # role, and content: a text, or a list of parts of type text and image_url

_PIECES = re.compile(r"[A-Za-z]{1,6}|[^A-Za-z\s]")  # English words of up to so many letters are mostly one token
_TOKENS_A_MESSAGE = 4  # of the role and of the chat template's marks
_TOKENS_AN_IMAGE, _MAX_TOKENS_AN_IMAGE = 1024, 16384


def estimate_tokens(messages: Sequence[Message]) -> int:
    """An estimate of the tokens of a prompt: one or more for a word, one for a digit or a sign."""
    contents = [_content(message) for message in messages]
    return sum(_text_tokens(text) + images * _TOKENS_AN_IMAGE + _TOKENS_A_MESSAGE for text, images in contents)


def _content(message: Message) -> tuple[str, int]:
    """The text of a message, and its number of images."""
    if isinstance(message["content"], str):
        return message["content"], 0
    texts = [part["text"] for part in message["content"] if part["type"] == "text"]
    return "\n".join(texts), len(message["content"]) - len(texts)


@functools.lru_cache(1024)  # most messages are the same in many prompts
def _text_tokens(text: str) -> int:
    return len(_PIECES.findall(text))


def max_prompt_tokens(messages: Sequence[Message]) -> int:
    """An upper bound of the tokens of a prompt: one for each byte, and 64 for each message's chat template."""
    contents = [_content(message) for message in messages]
    return sum(len(text.encode(errors="replace")) + images * _MAX_TOKENS_AN_IMAGE + 64 for text, images in contents)


class Prices(NamedTuple):
    """Dollars for a million tokens."""

    prompt: float
    completion: float

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6

"""Parses the text of an answer into turns, strictly: another form, or an empty text, is a `Fault`.

Conversation and reasoning are blocks between lines of three equals signs, each headed `Question:` or `Answer:`:

    Question:
    What is the man doing?
    ===
    Answer:
    He is making pasta.

A description is plain text.
"""

import re
from typing import NamedTuple

Turns = tuple[tuple[str, str], ...]  # question and answer

_SEPARATOR = re.compile(r"^[ \t]*={3,}[ \t]*$", re.MULTILINE)
_HEADED = re.compile(r"(Question|Answer):[ \t]*(.*)", re.DOTALL)
_HEADER = re.compile(r"^[ \t>*_#-]*(Question|Answer)\b[ \t*_]*\d*[ \t*_]*:", re.MULTILINE | re.IGNORECASE)
_ORDER = ("Question", "Answer")


class Fault(NamedTuple):
    """Why an answer is rejected: one of the reasons in `rules`, and what was found."""

    reason: str
    detail: str


def parse_conversation(text: str) -> Turns | Fault:
    """One or more pairs of question and answer."""
    blocks = [block.strip() for block in _SEPARATOR.split(text.strip())]
    if blocks == [""]:
        return Fault("empty", "the answer has no text")
    if not blocks[-1]:
        blocks.pop()  # a separator at the very end
    texts = []
    for number, block in enumerate(blocks):
        wanted = _ORDER[number % 2]
        headed = _HEADED.fullmatch(block)
        if not headed or headed[1] != wanted:
            return Fault(
                "wrong-form", f"block {number + 1} does not begin with a line {wanted}: but with {block[:40]!r}"
            )
        if _HEADER.search(headed[2]):
            return Fault("wrong-form", f"block {number + 1} holds another header: a line === is missing before it")
        if not headed[2].strip():
            return Fault("empty", f"block {number + 1} has no text after {wanted}:")
        texts.append(headed[2].strip())
    if len(texts) % 2:
        return Fault("wrong-form", "the last question has no answer")
    return tuple(zip(texts[::2], texts[1::2], strict=True))


def parse_reasoning(text: str) -> Turns | Fault:
    """One pair of question and answer."""
    turns = parse_conversation(text)
    if not isinstance(turns, Fault) and len(turns) > 1:
        return Fault("wrong-form", f"{len(turns)} questions where one was asked for")
    return turns


def parse_detail(text: str, question: str) -> Turns | Fault:
    """Plain text, which answers `question`."""
    text = text.strip()
    if not text:
        return Fault("empty", "the answer has no text")
    if _SEPARATOR.search(text) or _HEADER.search(text):
        return Fault("wrong-form", "questions and answers where a description was asked for")
    return ((question, text),)

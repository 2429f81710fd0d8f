"""Reasoning models write their thoughts before the answer, between marks that some servers leave in the text."""

import re

_NAMES = r"(?:[a-z]+:)?think(?:ing)?|thought|reasoning"  # <seed:think> is ByteDance's
_OPEN = re.compile(
    rf"<(?:{_NAMES})\s*>|\[THINK\]|◁think▷|<\|START_THINKING\|>|<\|begin_of_thought\|>"
    r"|<\|channel\|>(?:analysis|commentary)\b|<\|channel>thought\b",  # of gpt-oss and of Gemma 4
    re.IGNORECASE,
)
_CLOSE = re.compile(
    rf"</(?:{_NAMES})\s*>|\[/THINK\]|◁/think▷|<\|END_THINKING\|>|<\|end_of_thought\|>"
    r"|<\|channel\|>final<\|message\|>|<channel\|>",
    re.IGNORECASE,
)


def after_thinking(text: str) -> str | None:
    """What follows the last `</think>` of a text; the text itself where it has no such mark.

    The opening mark may be absent, as it is where the chat template ends with it. None where the thinking does not end,
    so that no answer follows.
    """
    *thoughts, rest = _CLOSE.split(text)
    if _OPEN.search(rest):
        return None
    return rest.strip() if thoughts else text


def says_nothing(text: str) -> bool:
    """Whether nothing of a text can be seen: it is empty, or white space and marks such as U+200B."""
    return not any(character.isprintable() and character != " " for character in text)

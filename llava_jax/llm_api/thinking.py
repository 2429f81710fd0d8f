"""The thinking of reasoning models: text before the answer, between marks that some servers leave in it."""

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
    """The text after the last `</think>`, or the whole text if it has no such mark. None if the thinking does not end.

    The opening mark may be absent, since it may be the end of the chat template.
    """
    *thoughts, rest = _CLOSE.split(text)
    if _OPEN.search(rest):
        return None
    return rest.strip() if thoughts else text


def says_nothing(text: str) -> bool:
    """Whether a text is empty or has only white space and invisible characters such as U+200B."""
    return not any(character.isprintable() and character != " " for character in text)

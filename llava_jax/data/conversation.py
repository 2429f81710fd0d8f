"""Renders the turns of a conversation to text in a template, for training and for answering alike.

An empty question or answer is rendered like any other; the published code takes it for an open turn.
"""

import hashlib
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from llava_jax.cli import UserError
from llava_jax.data.templates import EMPTY_THOUGHTS, IMAGE_TOKEN, THOUGHTS, Template

IMAGE_POSITIONS = ("random", "first", "as_is")
Turn = tuple[str, str]  # role and text
OpenTurn = tuple[str, str | None]  # whose text may be absent, see `render`


class Rendered(NamedTuple):
    """A rendered conversation and the [start, end) character spans to learn.

    A span begins where the prompt of an answer ends. It holds the template's `lead`, the answer and the end mark.
    """

    text: str
    target_spans: list[tuple[int, int]]


def render(turns: Sequence[OpenTurn], template: Template, system: str | None = None, begun: str = "") -> Rendered:
    """Renders turns to the text that the model is trained on.

    Args:
      turns: (role, text), 'user' and 'assistant' in turn, the user first. A turn of 'system' may come before them, and
        where the template has a place for results of tools, a later one of the user may be of 'tool' instead.
        Text None in a last turn of the assistant leaves it open: the text is then the prompt of an answer, with which
        the training text begins.
      system: the system prompt if `turns` have none; None for the template's own, "" for no system prompt.
      begun: the beginning of an open last turn, which the answer continues.

    Returns:
      The text and the spans to learn (equation 3 of the paper): what has to be generated after the prompt of an
      answer, including its end mark. The published code for `v0` also learns the role names and the `###` before them.
    """
    if turns and turns[0][0] == "system":
        (_, system), *turns = turns
    system = _clean(template.system if system is None else system, template)
    parts = [template.head.replace("{system}", system) if system else template.bare_head]
    length, spans = len(parts[0]), []
    for i, (role, text) in enumerate(turns):
        asks = "tool" if role == "tool" and i and template.result else "user"
        _check_turn(i, role, text, asks, last=i == len(turns) - 1)
        if role == asks:
            before, after = template.question if role == "user" else template.result
            if i:
                before = template.between + before
            added = [before, _question(text, template), after]
        elif text is None:
            added = [template.reply, template.lead + _clean(begun, template) if begun else ""]
            spans += [(length + len(template.reply), length + sum(map(len, added)))] if begun else []
        else:
            answer = _clean(text, template).replace(IMAGE_TOKEN, template.image)
            added = [template.reply, template.lead, answer, template.end, template.tail]
            start = length + len(template.reply)
            spans.append((start, start + len(template.lead) + len(answer) + len(template.end)))
        parts += added
        length += sum(map(len, added))
    return Rendered("".join(parts), spans)


def check_system(turns: Sequence[OpenTurn], template: Template) -> None:
    """Raises `UserError` if `render` would drop a system prompt, because the template has no place for one."""
    if turns and turns[0][0] == "system" and turns[0][1] and "{system}" not in template.head:
        raise UserError(f"template {template.name} has no place for a system prompt: remove it or take another")


def check_thoughts(turns: Sequence[OpenTurn], template: Template) -> None:
    """Raises `UserError` if an answer has thoughts, but the template says before each that there are none."""
    if EMPTY_THOUGHTS in template.reply:
        for role, text in turns:
            if role == "assistant" and any(mark in text for mark in THOUGHTS):
                raise UserError(
                    f"an answer has {' or '.join(THOUGHTS)}, but template {template.name} opens answers with an empty "
                    "block of thoughts: remove the thoughts, or take template chatml, which learns them as text"
                )


def place_images(turns: Sequence[Turn], position: str, seed: int, sample_id: str) -> tuple[Turn, ...]:
    """Moves the image marks of each turn to where the recipe wants them. None is dropped.

    `first` puts them before the text, `<image>\\n` for each, as published since v1.0 (which merges several marks into
    one). `random` is the order of the paper, equation 2: [Xq, Xv] or [Xv, Xq] in the first turn, with even odds, as a
    function of seed and sample id; later turns are as with `first`. `as_is` changes nothing.
    """
    if position not in IMAGE_POSITIONS:
        raise UserError(f"image position {position!r}: choose from {', '.join(IMAGE_POSITIONS)}")
    if position == "as_is":
        return tuple(turns)
    last = position == "random" and hashlib.sha256(f"{seed}:{sample_id}".encode()).digest()[0] % 2 == 1
    first = next((i for i, (role, _) in enumerate(turns) if role == "user"), 0)
    return tuple((role, _place(text, last=last and i == first)) for i, (role, text) in enumerate(turns))


def has_interleaved_images(turns: Sequence[Turn]) -> bool:
    """Whether a turn has text between its images, which `first` and `random` move before it."""
    return any(any(map(str.strip, text.split(IMAGE_TOKEN)[1:-1])) for _, text in turns)


def join_parts(parts: Sequence[str]) -> str:
    """Joins texts and image marks, a line each, unless a text has white space of its own beside a mark."""
    text = "".join(parts[:1])
    for before, part in itertools.pairwise(parts):
        beside = (before == IMAGE_TOKEN) != (part == IMAGE_TOKEN)
        text += part if beside and (before[-1:].isspace() or part[:1].isspace()) else f"\n{part}"
    return text


def place_prompt_images(turns: Sequence[Turn], position: str) -> list[Turn]:
    """Moves the image marks of a prompt to where a model trained with `position` expects them.

    `as_is` changes nothing. Otherwise they come before the text of their turn, as with `first` in `place_images`; a
    model trained with `random` has seen that, too. A turn that begins with all its marks does not change.
    """
    if position == "as_is":
        return list(turns)
    line = f"{IMAGE_TOKEN}\n"
    return [
        (role, text if text.startswith(line * text.count(IMAGE_TOKEN)) else _place(text, last=False))
        for role, text in turns
    ]


def _place(text: str, last: bool) -> str:
    marks = text.count(IMAGE_TOKEN)
    if not marks:
        return text
    text = text.replace(IMAGE_TOKEN, "").strip()
    images = [IMAGE_TOKEN] * marks
    lines = [text, *images] if last else [*images, text]
    return "\n".join(lines).strip()


def _question(text: str, template: Template) -> str:
    text = IMAGE_TOKEN * text.count(IMAGE_TOKEN) if template.captions else _clean(text, template)
    return text.replace(IMAGE_TOKEN, template.image)


def _clean(text: str, template: Template) -> str:
    return text.strip() if template.strip else text


def _check_turn(i: int, role: str, text: str | None, asks: str, last: bool) -> None:
    expected = asks if i % 2 == 0 else "assistant"
    if role != expected:
        raise UserError(f"turn {i + 1} is of {role!r} where {expected!r} was expected: user and assistant take turns")
    if text is None and not (last and role == "assistant"):
        raise UserError(f"turn {i + 1} has no text: only a last turn of the assistant may be open")

"""Renders the turns of a conversation to text in a template, for training and for answering alike.

An empty question or answer is rendered like any other; the published code takes it for an open turn.
"""

import hashlib
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from llava_jax.cli import UserError
from llava_jax.data.templates import (  # noqa: F401, until all import them there
    IM_END_TOKEN,
    IM_START_TOKEN,
    IMAGE_TOKEN,
    TEMPLATES,
    Template,
    choose_template,
    get_template,
    stop_strings,
    with_im_start_end,
)

IMAGE_POSITIONS = ("random", "first", "as_is")


class Rendered(NamedTuple):
    """A rendered conversation and the [start, end) character spans to learn.

    A span begins where the prompt of the answer ends, so with the template's `lead`, and holds answer and end mark.
    """

    text: str
    learned_spans: list[tuple[int, int]]


def render(
    turns: Sequence[tuple[str, str | None]], template: Template, system: str | None = None, begun: str = ""
) -> Rendered:
    """Renders turns as the model is trained on them.

    Args:
      turns: (role, text): 'user' and 'assistant' in turn, the user first; before them perhaps one of 'system'.
        Text None in a last turn of the assistant leaves it open: the prompt of an answer, and what the text of
        training begins with.
      system: the system prompt where `turns` bring none; None for the template's own, "" for no system prompt.
      begun: what an open last turn begins with, which the answer continues.

    Returns:
      The text and the spans to learn: all that has to be generated after the prompt of an answer, its end mark
      included, and nothing else (equation 3 of the paper). The published code for `v0` learns the role names and the
      `###` before them as well.
    """
    if turns and turns[0][0] == "system":
        (_, system), *turns = turns
    system = _clean(template.system if system is None else system, template)
    pieces = [template.head.replace("{system}", system) if system else template.bare_head]
    length, spans = len(pieces[0]), []
    for i, (role, text) in enumerate(turns):
        _check_turn(i, role, text, last=i == len(turns) - 1)
        if role == "user":
            before, after = template.question
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
        pieces += added
        length += sum(map(len, added))
    return Rendered("".join(pieces), spans)


def check_system(turns: Sequence[tuple[str, str | None]], template: Template) -> None:
    """Raises `UserError` where `render` would leave a system prompt out, since the template has no place for one."""
    if turns and turns[0][0] == "system" and turns[0][1] and "{system}" not in template.head:
        raise UserError(f"template {template.name} has no place for a system prompt: remove it or take another")


def place_images(
    turns: Sequence[tuple[str, str]], position: str, seed: int, sample_id: str
) -> tuple[tuple[str, str], ...]:
    """Puts the image marks of every turn where the recipe wants them; all of them stay.

    `first` puts them before the text, `<image>\\n` for each, as published since v1.0 (where several marks collapse
    into one, though). `random` is the order of the paper, equation 2: in the first turn [Xq, Xv] or [Xv, Xq], even
    odds, a function of seed and sample id; in later turns as `first`. `as_is` changes nothing.
    """
    if position not in IMAGE_POSITIONS:
        raise UserError(f"image position {position!r}: choose from {', '.join(IMAGE_POSITIONS)}")
    if position == "as_is":
        return tuple(turns)
    last = position == "random" and hashlib.sha256(f"{seed}:{sample_id}".encode()).digest()[0] % 2 == 1
    first = next((i for i, (role, _) in enumerate(turns) if role == "user"), 0)
    return tuple((role, _place(text, last=last and i == first)) for i, (role, text) in enumerate(turns))


def has_interleaved_images(turns: Sequence[tuple[str, str]]) -> bool:
    """Whether a turn has text between its images, which `first` and `random` take out of it."""
    return any(any(map(str.strip, text.split(IMAGE_TOKEN)[1:-1])) for _, text in turns)


def join_parts(parts: Sequence[str]) -> str:
    """One text of texts and image marks, a line each, unless a text has white space of its own beside a mark."""
    text = "".join(parts[:1])
    for before, part in itertools.pairwise(parts):
        beside = (before == IMAGE_TOKEN) != (part == IMAGE_TOKEN)
        text += part if beside and (before[-1:].isspace() or part[:1].isspace()) else f"\n{part}"
    return text


def place_prompt_images(turns: Sequence[tuple[str, str]], position: str) -> list[tuple[str, str]]:
    """Puts the image marks of a prompt where a model trained with `position` expects them.

    `as_is` changes nothing. Otherwise they stand before the text of their turn, as `place_images` has it for `first`;
    a model trained with `random` has seen that too. A turn that begins with all its marks is left as it is.
    """
    if position == "as_is":
        return list(turns)
    return [(role, text if _begins_with_images(text) else _place(text, last=False)) for role, text in turns]


def _begins_with_images(text: str) -> bool:
    return text.startswith(f"{IMAGE_TOKEN}\n" * text.count(IMAGE_TOKEN))


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


def _check_turn(i: int, role: str, text: str | None, last: bool) -> None:
    expected = "user" if i % 2 == 0 else "assistant"
    if role != expected:
        raise UserError(f"turn {i + 1} is of {role!r} where {expected!r} was expected: user and assistant take turns")
    if text is None and not (last and role == "assistant"):
        raise UserError(f"turn {i + 1} has no text: only a last turn of the assistant may be open")

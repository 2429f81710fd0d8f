"""Conversation templates, and the one function that renders turns to text, for training and for answering alike.

A template is a row of data: the strings that stand around the system prompt, the questions and the answers. The
texts are those that published checkpoints were trained on. Where the published code answers from another text
than it trains on, the text of training is rendered for both:

* `v0` trains on `{system}\\n\\n### Human: q\\n### Assistant: a\\n### `; its demo asks
  `{system}###Human: q###Assistant:`. The exchange on renewable energy that `v0`, unlike `llava_v0`, shows there
  before the first question was never in a training text and is left out: the two names mean the same here.
* The mmtag templates train on `<Image><image></Image>` inside the question; their demo makes it a turn of its own.

An empty question or answer is rendered like any other; the published code takes it for an open turn.
"""

import difflib
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from llava_jax.cli import UserError, warn

IMAGE_TOKEN = "<image>"  # marks in text where the features of an image go
IM_START_TOKEN, IM_END_TOKEN = "<im_start>", "<im_end>"
IMAGE_POSITIONS = ("random", "first", "as_is")


@dataclass(frozen=True, kw_only=True)
class Template:
    """The text around the turns: `head`, then `question` and `reply`, `lead`, answer, `end`, `tail` for every round."""

    name: str
    system: str | None  # the default system prompt; None: the one that the tokenizer's own chat template has
    head: str  # before the first turn, with {system} in it
    bare_head: str = ""  # the same where there is no system prompt
    question: tuple[str, str]  # before and after a question
    reply: str  # opens an answer: a prompt ends with it
    lead: str = ""  # between that and the answer
    end: str  # the end mark: learned with the answer, and what stops generation
    tail: str = ""  # after the end mark
    between: str = ""  # before every question but the first
    image: str = IMAGE_TOKEN  # how an image is marked
    strip: bool = False  # whether the white space around a turn's text goes
    captions: bool = False  # whether all of a question but its image marks is dropped
    special: tuple[str, ...] = ()  # marks of these texts that have to be tokens of their own


class Rendered(NamedTuple):
    """A rendered conversation and the [start, end) character spans to learn.

    A span begins where the prompt of the answer ends, so with the template's `lead`, and holds answer and end mark.
    """

    text: str
    learned_spans: list[tuple[int, int]]


_POLITE = (
    "A chat between a curious {who} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {who}'s questions."
)
_VISUAL = (
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_MMTAG = (  # no space after "language.", as published
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_LLAMA_2 = (  # two spaces after "safe.", as published
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)

_V0 = Template(
    name="llava_v0",
    system=_POLITE.format(who="human"),
    head="{system}\n\n### ",
    bare_head="### ",
    question=("Human: ", "\n### "),
    reply="Assistant:",
    lead=" ",
    end="\n###",  # the separator ends an answer; without it, and the line break before it, none would ever stop
    tail=" ",
)
_V1 = Template(
    name="v1",
    system=_POLITE.format(who="user"),
    head="{system} ",
    question=("USER: ", " "),
    reply="ASSISTANT:",
    lead=" ",
    end="</s>",
    special=("</s>",),
)
_LLAVA_LLAMA_2 = Template(
    name="llava_llama_2",
    system="You are a helpful language and vision assistant. " + _VISUAL,
    head="[INST] <<SYS>>\n{system}\n<</SYS>>\n\n",
    bare_head="[INST] ",
    question=("", " [/INST]"),
    reply="",
    lead=" ",
    end=" </s>",
    between="<s>[INST] ",
    special=("<s>", "</s>"),
)
_MPT = Template(
    name="mpt",
    system="A conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers.",
    head="<|im_start|>system\n{system}<|im_end|>",
    question=("<|im_start|>user\n", "<|im_end|>"),
    reply="<|im_start|>assistant\n",
    end="<|im_end|>",
    special=("<|im_start|>", "<|im_end|>"),
)
_MMTAG_IMAGE = f"<Image>{IMAGE_TOKEN}</Image>"

TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        replace(_V0, name="v0"),
        _V0,
        replace(_V0, name="v0_mmtag", system=_MMTAG, image=_MMTAG_IMAGE),
        _V1,
        replace(_V1, name="llava_v1", system=_POLITE.format(who="human")),
        replace(_V1, name="v1_mmtag", system=_MMTAG, image=_MMTAG_IMAGE),
        replace(_LLAVA_LLAMA_2, name="llama_2", system=_LLAMA_2),
        _LLAVA_LLAMA_2,
        replace(_LLAVA_LLAMA_2, name="mistral_instruct", system="", between="[INST] ", special=("</s>",)),
        _MPT,
        replace(_MPT, name="chatml_direct", system="Answer the questions."),
        Template(name="plain", system="", head="", question=("", ""), reply="", end="\n", captions=True),
        # From here on equal to the chat templates that tokenizers carry. BOS comes from the tokenizer.
        replace(
            _MPT,
            name="chatml",
            system=None,
            head="<|im_start|>system\n{system}<|im_end|>\n",
            question=("<|im_start|>user\n", "<|im_end|>\n"),
            tail="\n",
        ),
        Template(
            name="llama_3",
            system="",
            head="<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
            question=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
            reply="<|start_header_id|>assistant<|end_header_id|>\n\n",
            end="<|eot_id|>",
            strip=True,
            special=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        ),
        Template(
            name="zephyr",
            system="",
            head="<|system|>\n{system}</s>\n",
            question=("<|user|>\n", "</s>\n"),
            reply="<|assistant|>\n",
            end="</s>",
            tail="\n",
            special=("</s>",),
        ),
    )
}
_ALIASES = {"vicuna_v0": "v0", "vicuna_v1": "v1", "mistral_direct": "chatml_direct", "v0_plain": "plain"}


def get_template(name: str) -> Template:
    """The template of that name. Raises `UserError` that tells the nearest name."""
    template = TEMPLATES.get(_ALIASES.get(name, name))
    if template is None:
        near = difflib.get_close_matches(name, [*TEMPLATES, *_ALIASES], n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(TEMPLATES)}"
        raise UserError(f"no template is named {name!r}: {hint}")
    return template


def choose_template(requested: str | None, trained: str) -> Template:
    """The template to use with a checkpoint: its own unless another is asked for, which warns on stderr."""
    own = get_template(trained)
    if requested is None:
        return own
    chosen = get_template(requested)
    if replace(chosen, name=own.name) != own:
        warn(f"the checkpoint was made with template {own.name}, not {chosen.name}")
    return chosen


def with_im_start_end(template: Template, used: bool) -> Template:
    """The template for a model that saw every image between two tokens of its own, if they are `used`."""
    if not used:
        return template
    return replace(template, image=template.image.replace(IMAGE_TOKEN, IM_START_TOKEN + IMAGE_TOKEN + IM_END_TOKEN))


def stop_strings(template: Template) -> list[str]:
    """What ends an answer in generated text."""
    return [template.end.strip() or template.end]


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

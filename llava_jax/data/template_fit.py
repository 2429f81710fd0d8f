"""Checks that a conversation template fits a tokenizer, and finds the template of a tokenizer's own chat template."""

import sys
from collections.abc import Sequence

import numpy as np
from etils import epath

from llava_jax.cli import UserError, say
from llava_jax.data.chat_template import render_chats
from llava_jax.data.conversation import Turn, render
from llava_jax.data.templates import EMPTY_THOUGHTS, TEMPLATES, Template, get_template
from llava_jax.data.tokenization import IGNORE_INDEX, default_system, encode_turns
from llava_jax.data.tokenizer_files import Tokenizer

_QUESTION, _ANSWER = ("user", "What is it?"), ("assistant", "A cat")
# Beginnings that tokenizers treat differently. `encode_turns` handles white space in each sample.
_ANSWERS = (
    "A cat.", "a cat", "2", "3 cats.", "été", "日本", "Ответ", "(a)", "'s", '"x"', "- x", "...", "🧑", "<b>", ""
)  # fmt: skip


def require_fit(template: Template, tokenizer: Tokenizer) -> None:
    """Checks that training texts begin with the ids of their prompt, and that the labels begin right after it.

    Raises UserError naming the template and the tokens for which that fails: the model would learn to continue another
    prompt than it gets.
    """
    prompt = encode_turns([_QUESTION, ("assistant", None)], template, tokenizer).input_ids
    for answer in _ANSWERS:
        try:
            ids, labels = encode_turns([_QUESTION, ("assistant", answer)], template, tokenizer)
        except UserError as error:
            raise UserError(f"template {template.name}: {error}") from None
        same = len(ids) > len(prompt) and np.array_equal(ids[: len(prompt)], prompt)
        if not same or labels[len(prompt)] == IGNORE_INDEX or (labels[: len(prompt)] != IGNORE_INDEX).any():
            first = int(np.argmin([*(ids[: len(prompt)] == prompt[: len(ids)]), False]))
            asked, trained = (tokenizer.convert_ids_to_tokens(some[first:][:3].tolist()) for some in (prompt, ids))
            raise UserError(
                f"template {template.name} does not fit the tokenizer: an answer's prompt ends with {asked}, where "
                f"the training text of the answer {answer!r} has {trained}; {_others(template, tokenizer)}"
            )


def missing_marks(template: Template, tokenizer: Tokenizer) -> str | None:
    """A message if a mark of the template, such as the end of an answer, is no token of the tokenizer; else None.

    Here answers still end at the text of the end mark, but an exported model does not stop in other programs.
    """
    missing = _missing(template, tokenizer)
    if not missing:
        return None
    pieces = ", ".join(
        f"{mark} is {len(parts)} tokens {parts}" for mark in missing if (parts := tokenizer.tokenize(mark))
    )
    end = ", so an exported model does not stop after an answer" if template.end.strip() in missing else ""
    return f"template {template.name} does not fit the tokenizer: {pieces}{end}; {_others(template, tokenizer)}"


def end_of_answer(template: Template, tokenizer: Tokenizer) -> int | None:
    """The token that ends an answer in a training text; None if several tokens do."""
    labels = encode_turns([_QUESTION, ("assistant", "A cat")], template, tokenizer).labels
    last = int(labels[labels != IGNORE_INDEX][-1])
    return last if tokenizer.decode([last]) in (template.end, template.end.strip()) else None


def template_of(tokenizer: Tokenizer) -> Template | None:
    """The template that renders like the tokenizer's own chat template; None if none does or it has none."""
    if not tokenizer.chat_template:
        return None
    chats = [[{"role": role, "content": text} for role, text in turns] for turns in _CHATS]
    rendered = render_chats(chats, tokenizer.chat_template, tokenizer)
    for template in TEMPLATES.values():
        *alike, with_system = (_alike(template, tokenizer, *each) for each in zip(_CHATS, rendered, strict=True))
        if all(alike) and with_system is not False:
            return template
    return None


def chosen_template(
    name: str | None, tokenizer: Tokenizer, where: epath.PathLike, default: str | None = None
) -> Template:
    """The template `name` or, for None, the one of the tokenizer's chat template, or else the default.

    A template that is not chosen by name is reported on standard error. Raises UserError if there is none.
    """
    if name is not None:
        return get_template(name)
    own = template_of(tokenizer)
    if own is None:
        what = "a chat template that is none of the templates" if tokenizer.chat_template else "no chat template"
        if default is None:
            raise UserError(f"{where}: has {what}: name the template of the conversations, such as --template v1")
        say(f"template {default}, since the tokenizer has {what}; --template NAME chooses another", file=sys.stderr)
        return get_template(default)
    say(f"template {own.name}, which is the tokenizer's own chat template", file=sys.stderr)
    return own


def _missing(template: Template, tokenizer: Tokenizer) -> list[str]:
    vocab = tokenizer.get_vocab()
    return [
        mark
        for mark in template.special
        if mark not in vocab or vocab[mark] not in tokenizer.encode(f"a{mark}b", add_special_tokens=False)
    ]


def _others(template: Template, tokenizer: Tokenizer) -> str:
    """Which template to choose instead."""
    own = template_of(tokenizer)
    if own is not None and own.name != template.name:
        return f"choose template {own.name}, which its own chat template is"
    fitting = [other.name for other in TEMPLATES.values() if other.special and not _missing(other, tokenizer)]
    names = ", ".join(name for name in fitting if name != template.name)
    return f"choose a template whose marks it has ({names})" if names else "choose one without such marks (llava_v0)"


# Conversations that tell the templates apart. Some chat templates refuse system prompts.
_CHATS = ((_QUESTION,), (_QUESTION, _ANSWER), (_QUESTION, _ANSWER, _QUESTION), (("system", "s"), _QUESTION))


def _alike(template: Template, tokenizer: Tokenizer, turns: Sequence[Turn], rendered: str | None) -> bool | None:
    """Whether the template renders a conversation, with the prompt of an answer after a question, as the chat template
    `rendered` it. None if that does not render it."""
    if rendered is None:
        return None
    system = default_system(tokenizer) if template.system is None else None
    asks = turns[-1][0] == "user"
    ours = render([*turns, ("assistant", None)] if asks else turns, template, system).text
    if EMPTY_THOUGHTS in template.reply and (asks or EMPTY_THOUGHTS in rendered):
        # Qwen3's own template has it before a last answer, and in a prompt if it is told not to think.
        ours, rendered = (text.replace(EMPTY_THOUGHTS, "") for text in (ours, rendered))
    return rendered in (ours, f"{tokenizer.bos_token}{ours}")  # `render` leaves BOS to the tokenizer

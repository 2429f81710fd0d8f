"""Conversation templates: the strings around the system prompt, the questions and the answers, registered by name.

The texts are those that published checkpoints were trained on. Where the published code generates from another text
than it trains on, the text of training is used for both:

* `v0` trains on `{system}\\n\\n### Human: q\\n### Assistant: a\\n### `; its demo asks
  `{system}###Human: q###Assistant:`. The exchange on renewable energy that `v0`, unlike `llava_v0`, shows there
  before the first question was in no training text and is left out: the two names mean the same here.
* The mmtag templates train on `<Image><image></Image>` inside the question; their demo makes it a separate turn.
"""

import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

from llava_jax.cli import warn
from llava_jax.registry import Registry

IMAGE_TOKEN = "<image>"  # marks the place of an image in a text
IM_START_TOKEN, IM_END_TOKEN = "<im_start>", "<im_end>"
THOUGHTS = ("<think>", "</think>")  # marks of a block of thoughts before an answer
EMPTY_THOUGHTS = "<think>\n\n</think>\n\n"  # such a block where a model does not think


@dataclass(frozen=True, kw_only=True)
class Template:
    """The text around the turns: `head`, then `question` and `reply`, `lead`, answer, `end`, `tail` for every round."""

    name: str
    system: str | None  # the default system prompt; None for that of the tokenizer's chat template
    head: str  # before the first turn, with {system} in it
    bare_head: str = ""  # the same without a system prompt
    question: tuple[str, str]  # before and after a question
    reply: str  # opens an answer: a prompt ends with it
    lead: str = ""  # between `reply` and the answer
    end: str  # the end mark: a target, as the answer; generation stops there
    tail: str = ""  # after the end mark
    between: str = ""  # before every question but the first
    image: str = IMAGE_TOKEN  # the mark of an image
    strip: bool = False  # whether to strip the white space around the text of a turn
    result: tuple[str, str] = ()  # before and after the result of a tool, where that is no question
    captions: bool = False  # whether to drop all of a question but its image marks
    special: tuple[str, ...] = ()  # marks that have to be single tokens


TEMPLATES: Registry[Template] = Registry("template")
register = TEMPLATES.add  # (template, *aliases); the module that calls it has to be imported before the name is used
get_template = TEMPLATES.find


def choose_template(requested: str | None, trained: str) -> Template:
    """The template to use with a checkpoint: `requested` (which warns if it is another one) or the one of training."""
    own = get_template(trained)
    if requested is None:
        return own
    chosen = get_template(requested)
    if replace(chosen, name=own.name) != own:
        warn(f"the checkpoint was made with template {own.name}, not {chosen.name}")
    return chosen


def with_im_start_end(template: Template, used: bool) -> Template:
    """The template with each image between two special tokens, if these are `used`."""
    if not used:
        return template
    return replace(template, image=template.image.replace(IMAGE_TOKEN, IM_START_TOKEN + IMAGE_TOKEN + IM_END_TOKEN))


def stop_strings(template: Template) -> list[str]:
    """The texts that end an answer in generated text."""
    return [template.end.strip() or template.end]


def _register_built_in() -> None:
    """Registers the templates of `templates.toml`."""
    for fields in tomllib.loads(Path(__file__).with_name("templates.toml").read_text(encoding="utf-8"))["template"]:
        aliases, like = fields.pop("aliases", ()), fields.pop("like", None)
        fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
        register(replace(TEMPLATES[like], **fields) if like else Template(**{"system": None} | fields), *aliases)


_register_built_in()

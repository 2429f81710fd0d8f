"""Conversation templates: the strings around the system prompt, the questions and the answers, registered by name.

The texts are those that published checkpoints were trained on. Where the published code generates from another text
than it trains on, the text of training is used for both:

* `v0` trains on `{system}\\n\\n### Human: q\\n### Assistant: a\\n### `; its demo asks
  `{system}###Human: q###Assistant:`. The exchange on renewable energy that `v0`, unlike `llava_v0`, shows there
  before the first question was in no training text and is left out: the two names mean the same here.
* The mmtag templates train on `<Image><image></Image>` inside the question; their demo makes it a separate turn.
"""

from dataclasses import dataclass, replace

from llava_jax.cli import warn
from llava_jax.registry import Registry

IMAGE_TOKEN = "<image>"  # marks the place of an image in a text
IM_START_TOKEN, IM_END_TOKEN = "<im_start>", "<im_end>"


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


# ---- The built-in templates

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

register(replace(_V0, name="v0"), "vicuna_v0")
register(_V0)
register(replace(_V0, name="v0_mmtag", system=_MMTAG, image=_MMTAG_IMAGE))
register(_V1, "vicuna_v1")
register(replace(_V1, name="llava_v1", system=_POLITE.format(who="human")))
register(replace(_V1, name="v1_mmtag", system=_MMTAG, image=_MMTAG_IMAGE))
register(replace(_LLAVA_LLAMA_2, name="llama_2", system=_LLAMA_2))
register(_LLAVA_LLAMA_2)
register(replace(_LLAVA_LLAMA_2, name="mistral_instruct", system="", between="[INST] ", special=("</s>",)))
register(_MPT)
register(replace(_MPT, name="chatml_direct", system="Answer the questions."), "mistral_direct")
register(Template(name="plain", system="", head="", question=("", ""), reply="", end="\n", captions=True), "v0_plain")
# The rest equal the chat templates of tokenizers. The tokenizer adds BOS.
register(
    replace(
        _MPT,
        name="chatml",
        system=None,
        head="<|im_start|>system\n{system}<|im_end|>\n",
        question=("<|im_start|>user\n", "<|im_end|>\n"),
        tail="\n",
    )
)
register(
    Template(
        name="llama_3",
        system="",
        head="<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
        question=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        reply="<|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
        strip=True,
        special=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    )
)
register(
    Template(
        name="zephyr",
        system="",
        head="<|system|>\n{system}</s>\n",
        question=("<|user|>\n", "</s>\n"),
        reply="<|assistant|>\n",
        end="</s>",
        tail="\n",
        special=("</s>",),
    )
)

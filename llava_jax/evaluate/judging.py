"""What a judge is asked: the question, what is in the picture in words, two answers, and how to score them."""

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava_jax.cli import UserError, say
from llava_jax.evaluate.answers import read_json
from llava_jax.llm_api.asking import Outcome, Task, ask_all, forecast
from llava_jax.llm_api.cost import Message
from llava_jax.llm_api.options import ledger_directory, work

SYSTEM = "You compare answers to questions about pictures: carefully, exactly and without favour."
BOXES = (
    " and gives the place of each object as [x1, y1, x2, y2], the left, upper, right and lower edge as fractions of "
    "the width and height of the picture"
)
PROMPT = """Two assistants have answered a question about a picture. You cannot see it; the context describes it{boxes}.
Judge how helpful, relevant, correct and detailed each answer is, and give each a score from 1 to 10, where 10 is best.
Your first line has to hold nothing but the two scores, that of {role} 1 and that of {role} 2, with a space between.
From the next line on, give your reasons. Which answer stands first must not count, nor which is longer."""
COCO, WILD = ("conv", "detail", "complex"), ("llava_bench_conv", "llava_bench_detail", "llava_bench_complex")


class Rule(NamedTuple):
    """How answers to questions of a category are judged, and what who gave them is called."""

    role: str
    prompt: str


RULES = {name: Rule("Assistant", PROMPT.format(boxes=BOXES, role="Assistant")) for name in COCO} | {
    name: Rule("Assistant", PROMPT.format(boxes="", role="Assistant")) for name in WILD
}


class Answered(NamedTuple):
    """A question with two answers to it."""

    context: str
    question: str
    reference: str
    model: str


def ask(
    args: argparse.Namespace, model: str, tasks: Sequence[Task], hash_: str, what: str, folder: str = ""
) -> list[Outcome] | None:
    """The outcome of each task of a command. None of a dry run, which prints what asking would cost.

    Args:
      hash_: of the instructions, see `prompt_hash`.
      what: is done by the model, for the progress.
      folder: of the ledger's, where a command asks several models.
    """
    asked = work(args, model)
    if args.dry_run:
        say(f"{model}: {forecast(asked, tasks)}")
        return None
    return ask_all(asked, tasks, ledger_directory(args) / folder, {"prompt_hash": hash_}, f"{what} {model}")


def read_prompt(name: str) -> str:
    """One of `prompt_files`."""
    return Path(__file__).with_name("prompt_files").joinpath(name).read_text(encoding="utf-8").rstrip("\n")


def read_rules(path: str) -> dict[str, Rule]:
    """The rules of a file in the original's form: `{category: {"role": ..., "prompt": ...}}`."""
    rules = read_json(path)
    try:
        return {name: Rule(str(rule["role"]), str(rule["prompt"])) for name, rule in rules.items()}
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f'{path}: is no {{"category": {{"role": ..., "prompt": ...}}}} in JSON: {error}') from error


def messages(item: Answered, rule: Rule, swapped: bool, system: str = SYSTEM) -> list[Message]:
    """What the judge is sent, laid out as in the original; `swapped` shows the model's answer first."""
    first, second = (item.model, item.reference) if swapped else (item.reference, item.model)
    content = (
        f"[Context]\n{item.context}\n\n[Question]\n{item.question}\n\n"
        f"[{rule.role} 1]\n{first}\n\n[End of {rule.role} 1]\n\n"
        f"[{rule.role} 2]\n{second}\n\n[End of {rule.role} 2]\n\n"
        f"[System]\n{rule.prompt}\n\n"
    )
    return [{"role": "system", "content": system}, {"role": "user", "content": content}]


def prompt_hash(instructions: Any) -> str:
    """SHA-256 of all that is the same in every prompt."""
    return hashlib.sha256(json.dumps(instructions, sort_keys=True).encode()).hexdigest()


def rules_hash(rules: dict[str, Rule], categories: Sequence[str], system: str = SYSTEM) -> str:
    """Of the instructions for these categories. Raises `UserError` where one has no rule."""
    if missing := sorted(set(categories) - set(rules)):
        raise UserError(f"there is no rule for category {missing[0]}; there are {', '.join(sorted(rules))}")
    empty = Answered("", "", "", "")
    return prompt_hash({name: messages(empty, rules[name], False, system) for name in sorted(set(categories))})

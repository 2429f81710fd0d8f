"""The requests about a context and the verdict on it, as pure functions of the answers so far.

`next_step` returns the next request (the first, or one that has the model repair its answer) or the verdict.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from llava_jax.datagen.contexts import Context
from llava_jax.datagen.instructions import DETAILED, pick
from llava_jax.datagen.parsing import Fault, Turns, parse_conversation, parse_detail, parse_reasoning
from llava_jax.datagen.prompts import Prompts
from llava_jax.datagen.rules import REPAIRS, find_fault, find_refusal
from llava_jax.llm_api.cost import Message
from llava_jax.llm_api.ledger import ACCEPTED, CUT_OFF, FILTERED, Answer, Request

KINDS = ("conversation", "detail", "reasoning")


class Recipe(NamedTuple):
    """Everything besides the model's answers that the verdict on a context depends on."""

    kind: str  # of KINDS
    prompts: Prompts
    boxes: bool  # whether prompts have them
    attempts: int = 3  # answers of which one has to be good
    language: str | None = "en"  # ISO 639-1, None for any
    seed: int = 0

    def identity(self) -> dict[str, Any]:
        """The fields by which recipes differ."""
        prompts = hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()[:16]
        return {**self._asdict(), "prompts": prompts}


class Verdict(NamedTuple):
    """The verdict on a context: accepted with turns, or rejected for a reason. `attempts` judges each answer."""

    reason: str
    detail: str = ""
    turns: Turns = ()
    attempts: tuple[str, ...] = ()

    @property
    def value(self) -> Any:
        """The value for the ledger."""
        return self.turns if self.reason == ACCEPTED else self.detail


def next_step(recipe: Recipe, context: Context, answers: Sequence[Answer]) -> Request | Verdict:
    """The next step after the answers to the requests that this function returned before."""
    reasons, asked_again = [], []
    for attempt, answer in enumerate(answers):
        read = judge(recipe, context, answer)
        if not isinstance(read, Fault):
            return Verdict(ACCEPTED, turns=read, attempts=(*reasons, ACCEPTED))
        reasons.append(read.reason)
        if attempt + 1 == recipe.attempts:
            return Verdict(*read, attempts=tuple(reasons))
        asked_again += _ask_again(recipe, answer, read)
    return Request(context.id, len(answers), [*recipe.prompts.messages(context.text(recipe.boxes)), *asked_again])


def give_up(recipe: Recipe, context: Context, answers: Sequence[Answer], reason: str, detail: str) -> Verdict:
    """The verdict if no more answers can be had, and no answer so far is good."""
    return Verdict(reason, detail, attempts=tuple(judge(recipe, context, answer).reason for answer in answers))


def judge(recipe: Recipe, context: Context, answer: Answer) -> Turns | Fault:
    """The turns of an answer, or its fault."""
    if answer.finish_reason == FILTERED:
        return Fault("refusal", "the server's filter")
    if answer.finish_reason == CUT_OFF:
        return Fault("cut-off", "max_tokens" if answer.text else "its thinking does not end")
    if answer.text is None:
        return Fault("empty", "the answer has no text")
    if recipe.kind == "detail":
        turns = parse_detail(answer.text, pick(DETAILED, recipe.seed, context.id))
    else:
        turns = (parse_conversation if recipe.kind == "conversation" else parse_reasoning)(answer.text)
    if isinstance(turns, Fault):
        return find_refusal(answer.text) or turns  # a refusal has no form
    return find_fault(turns, recipe.language) or turns


def _ask_again(recipe: Recipe, answer: Answer, fault: Fault) -> list[Message]:
    if not answer.text or not answer.text.strip():
        return []  # the same request again: servers do not accept empty messages
    complaint = REPAIRS[fault.reason].format(detail=fault.detail, language=f"the language {recipe.language!r}")
    return [{"role": "assistant", "content": answer.text}, {"role": "user", "content": complaint}]

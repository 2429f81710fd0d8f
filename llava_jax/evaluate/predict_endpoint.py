"""`predict` with a model behind an OpenAI-compatible API. A ledger beside the output keeps all replies, so that no
answer is paid for twice."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

from etils import epath

from llava_jax.cli import UserError, say, short, warn
from llava_jax.data.image_folder import folder_of
from llava_jax.evaluate.answer_file import AnswerFile
from llava_jax.evaluate.questions import MARK, Question, data_url, system_turns
from llava_jax.llm_api.asking import CUT, EMPTY, Outcome, Task, Work, ask_all, forecast
from llava_jax.llm_api.options import ledger_directory, work

AT_A_TIME = 512  # questions whose images are in memory
GREEDY = {"top_p": 1.0, "seed": 0}  # the defaults of sampling
LIMITS = ("max_tokens", "max_completion_tokens")
MAX_WARNINGS = 10  # about single questions


def predict(args: argparse.Namespace, questions: Sequence[Question]) -> None:
    """Raises `UserError` if the server failed temporarily at some questions, which stay without an answer."""
    asked = _work(args)
    # With more tokens, those that were cut off are asked again.
    body = {name: value for name, value in asked.settings.body.items() if name not in LIMITS}
    file = AnswerFile(args.output, questions, args.model_id, settings={"model": args.model, "body": body})
    waiting = [question for question in questions if not file.answers(question)]
    if args.dry_run:
        say(f"{args.model}: {forecast(asked, [_task(question, args) for question in waiting])}")
        return
    directory = ledger_directory(args)
    lacking: list[tuple[Question, Outcome]] = []
    cut = 0
    size = AT_A_TIME if not asked.batch else max(1, len(waiting))
    for start in range(0, len(waiting), size):
        some = waiting[start : start + size]
        left = f", {len(waiting) - start} left" if len(waiting) > size else ""
        tasks = [_task(question, args) for question in some]
        found = list(zip(some, ask_all(asked, tasks, directory, {}, f"asking {args.model}{left}"), strict=True))
        lacking += [(question, outcome) for question, outcome in found if outcome.value is None]
        cut += sum(outcome.cut for _, outcome in found if outcome.value is not None)
        file.add(
            [(question, _text(outcome)) for question, outcome in found if not outcome.open],
            {question.key: outcome.reason for question, outcome in found if outcome.value is None},
        )
    if cut:
        warn(f"{cut} answers were cut off at --max-tokens and count as far as they go")
    _warn([(question, outcome.reason) for question, outcome in lacking if not outcome.open])
    if still := [(question, outcome.reason) for question, outcome in lacking if outcome.open]:
        question, reason = still[0]
        raise UserError(
            f"{args.output}: {len(still)} of {len(questions)} questions have no answer yet, {question.id} the first "
            f"({reason}); the same command asks them again"
        )
    say(f"{file.finish(file.lines)} answers: {args.output}", file=sys.stderr)


def _task(question: Question, args: argparse.Namespace) -> Task:
    name = "\n".join(map(str, question.key))
    return Task(name, partial(messages, question, folder_of(args)), str.strip, whole=None)


def _text(outcome: Outcome) -> str | None:
    """The answer: "" if the model replied with an empty text, None if there is no answer."""
    return "" if outcome.reason == EMPTY and outcome.text is not None else outcome.value


def _warn(lacking: Sequence[tuple[Question, str]]) -> None:
    """Warns of questions that stay without an answer."""
    for question, reason in lacking[:MAX_WARNINGS]:
        warn(f"question {short(str(question.id))}: no answer ({reason}), which counts as wrong")
    if len(lacking) > MAX_WARNINGS:
        warn(f"{len(lacking)} questions in all have no answer, which counts as wrong")
    if cut := sum(reason == CUT for _, reason in lacking):
        warn(
            f"the model was cut off while it thought, {cut} times: the same command asks these questions again with a "
            "larger --max-tokens and another --ledger"
        )


def messages(question: Question, folder: epath.PathLike) -> list[dict[str, Any]]:
    """The system prompt, if there is one, and the user's turn, with images in the places that the file has, or before
    the text."""
    system = [{"role": role, "content": text} for role, text in system_turns(question)]
    if not question.images:
        return [*system, {"role": "user", "content": question.text}]
    try:
        urls = [data_url(image, folder) for image in question.images]
    except UserError as error:
        raise UserError(f"question {question.id}: {error}") from error
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    texts = question.marked_text.split(MARK) if question.marked_text else [*[""] * len(urls), question.text]
    parts = [{"type": "text", "text": text} if text else None for text in texts]
    content = [part for pair in zip_longest(parts, images) for part in pair if part]
    return [*system, {"role": "user", "content": content}]


def _work(args: argparse.Namespace) -> Work:
    sampling = {"top_p": args.top_p, "seed": args.seed}
    if not args.temperature:  # greedy, unless --body has another one: options that were given are sent anyway
        sampling = {name: value for name, value in sampling.items() if value != GREEDY[name]}
    return work(argparse.Namespace(**{**vars(args), "body": [sampling, *args.body]}), args.model)

"""Asks a model all of many tasks, each until an answer to it can be read, and goes on where an earlier run ended."""

import asyncio
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava_jax.cli import UserError, say, track
from llava_jax.llm_api.batches import TRIES, Batches
from llava_jax.llm_api.client import REFUSED, SERVER_ERROR, Client, Refused, Settings, Stopped
from llava_jax.llm_api.cost import Budget, Message, estimate_tokens
from llava_jax.llm_api.ledger import CUT_OFF, FILTERED, Answer, Ledger, Request
from llava_jax.llm_api.stopping import stopped_by_signals
from llava_jax.llm_api.thinking import says_nothing

CUT, EMPTY = "cut off at --max-tokens", "empty"  # why an answer is none
LONGER = "give a larger --max-tokens and another --ledger"  # what helps where answers are cut off


class Task(NamedTuple):
    """A prompt, and what reads the answer to it: None where it's no good and another is wanted."""

    name: str
    messages: Callable[[], Sequence[Message]]  # made when they are needed, since pictures take memory
    read: Callable[[str], Any]
    whole: bool | None = True  # whether an answer that was cut off is none, or else is read as far as it goes. None:
    # it is none if the model thinks before other answers, since nothing else tells thinking from an answer then


class Outcome(NamedTuple):
    """What was read from the last answer, or why nothing could be."""

    text: str | None  # the answer, without its thinking
    value: Any
    reason: str = ""  # where there is no value
    open: bool = False  # whether the server only failed for a while: the same command asks again
    cut: bool = False  # whether the answer ends where it was cut off

    @property
    def shown(self) -> str:
        """The text for files that keep what was answered."""
        return self.text or f"no answer: {self.reason}"


class Work(NamedTuple):
    """Whom to ask, and what may be spent."""

    settings: Settings
    budget: float | None = None  # dollars
    attempts: int = 3  # answers of which one has to be good
    batch: bool = False  # whether requests go through the batch API
    poll: float = 60.0  # seconds between looks at batches


def ask_all(work: Work, tasks: Sequence[Task], directory: Path, identity: dict[str, Any], what: str) -> list[Outcome]:
    """The outcome of each task. What the ledger in `directory` holds by now is not paid again.

    Args:
      identity: what must not change between runs with the same ledger, besides the model and its parameters.
      what: the work, for the progress.

    Raises:
      UserError: where the ledger is of other work, no request can succeed, or the budget is spent. What was answered
        until then is kept, as it is at Ctrl-C.
    """
    settings = work.settings
    ledger = Ledger(directory / "ledger.sqlite", settings.model, settings.body)
    try:
        ledger.identify({**identity, "model": settings.model, "body": settings.body})
        if ledger.open_batches() and not work.batch:
            raise UserError(f"{ledger.path}: answers of the batch API are awaited: go on with --batch")
        outcomes = asyncio.run((_ask_in_batches if work.batch else _ask_all)(work, tasks, ledger, what))
        if any(outcome.cut and task.whole is None for task, outcome in zip(tasks, outcomes, strict=True)):
            whole = ledger.has_thinking()
            tasks = [task._replace(whole=whole) if task.whole is None else task for task in tasks]
            outcomes = [
                _next(ledger, task, work.attempts) if outcome.cut else outcome
                for task, outcome in zip(tasks, outcomes, strict=True)
            ]
        spent = ledger.totals()
    finally:
        ledger.close()
    say(
        f"{what}: {spent.requests} requests of {spent.prompt_tokens:,} and {spent.completion_tokens:,} tokens, "
        f"${spent.cost:.4f}",
        file=sys.stderr,
    )
    return outcomes


def forecast(work: Work, tasks: Sequence[Task]) -> str:
    """What asking all would cost, without an answer that has to be asked for again."""
    prompt = sum(estimate_tokens(task.messages()) for task in tasks)
    completion = work.settings.most_completion_tokens * len(tasks)
    cost = work.settings.prices.cost(prompt, completion)
    return f"{len(tasks)} requests of about {prompt:,} tokens, answers of up to {completion:,}: up to about ${cost:.2f}"


def told(outcomes: Sequence[Outcome]) -> str:
    """For the line that ends a command: how many have no value for what can be mended."""
    failed, cut = sum(outcome.open for outcome in outcomes), sum(outcome.reason == CUT for outcome in outcomes)
    notes = [f"{failed} as the server failed: the same command asks again"] if failed else []
    notes += [f"{cut} {CUT}: {LONGER}"] if cut else []
    return f" ({'; '.join(notes)})" if notes else ""


async def _ask_all(work: Work, tasks: Sequence[Task], ledger: Ledger, what: str) -> list[Outcome]:
    """One by one, many at a time."""
    async with Client(work.settings, ledger, Budget(work.budget, ledger.totals().cost)) as client:
        running = [asyncio.create_task(_ask(client, task, work.attempts)) for task in tasks]
        try:
            with stopped_by_signals(client):
                for done in track(asyncio.as_completed(running), what, len(running)):
                    await done
        except (UserError, Stopped) as error:
            client.stop.set()  # what is under way is paid: its answers are waited for
            await asyncio.gather(*running, return_exceptions=True)
            if isinstance(error, Stopped):
                raise KeyboardInterrupt from error
            raise
    return [task.result() for task in running]


async def _ask(client: Client, task: Task, attempts: int) -> Outcome:
    task = task._replace(messages=functools.cache(task.messages))
    while isinstance(step := _next(client.ledger, task, attempts), Request):
        try:
            await client.ask(step)
        except Refused as error:
            return Outcome(None, None, str(error), open=error.reason == SERVER_ERROR)
    return step


async def _ask_in_batches(work: Work, tasks: Sequence[Task], ledger: Ledger, what: str) -> list[Outcome]:
    """In rounds of all that are next."""
    by_name = {task.name: task for task in tasks}
    given_up: dict[str, str] = {}

    def next_of(name: str) -> Request | Outcome:
        if name not in by_name:
            raise UserError(
                f"{ledger.path}: awaits an answer to {name}, which is not asked here; choose another directory"
            )
        if name in given_up:
            return Outcome(None, None, f"{REFUSED}: {given_up[name]}")
        step = _next(ledger, by_name[name], work.attempts)
        if isinstance(step, Request) and ledger.failures(step) >= TRIES:
            return Outcome(None, None, f"{SERVER_ERROR}: {TRIES} tries failed", open=True)
        return step

    async with Batches(work.settings, ledger, work.budget, next_of, work.poll) as batches:
        given_up |= await batches.collect()  # of an earlier run
        while held := batches.make(step for name in by_name if isinstance(step := next_of(name), Request)):
            say(f"{what}: {held} requests go out in batches; interrupted, the same command goes on", file=sys.stderr)
            given_up |= await batches.collect()
    return [next_of(name) for name in by_name]


def _next(ledger: Ledger, task: Task, attempts: int) -> Request | Outcome:
    """The request that comes next after the answers in the ledger, or what these come to."""
    messages, outcome = task.messages(), Outcome(None, None)
    for attempt in range(attempts):
        request = Request(task.name, attempt, messages)
        if (answer := ledger.answer(request)) is None:
            return request
        reason = no_answer(answer, bool(task.whole))
        value = None if reason else task.read(answer.text)
        why = reason or ("" if value is not None else "of another form")
        outcome = Outcome(answer.text, value, why, cut=answer.finish_reason == CUT_OFF)
        if value is not None or reason == CUT:  # which the same limit would cut again
            break
    return outcome


def no_answer(answer: Answer, whole: bool = True) -> str:
    """Why an answer is none; empty where it is one."""
    if answer.finish_reason == FILTERED:
        return f"stopped by a filter: {answer.text or ''}".rstrip(": ")
    if answer.finish_reason == CUT_OFF and ((whole and not answer.thought) or not answer.text):
        return CUT
    return EMPTY if says_nothing(answer.text or "") else ""

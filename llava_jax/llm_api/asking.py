"""Asks a model about many tasks, each until an answer can be read, and resumes where an earlier run ended."""

import asyncio
import functools
import sqlite3
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from llava_jax.cli import UserError, say, track
from llava_jax.llm_api.batches import TRIES, run_batches
from llava_jax.llm_api.budget import Budget
from llava_jax.llm_api.client import Client
from llava_jax.llm_api.cost import Message, estimate_tokens
from llava_jax.llm_api.errors import REFUSED, SERVER_ERROR, Refused
from llava_jax.llm_api.ledger import CUT_OFF, FILTERED, Answer, Ledger, Request
from llava_jax.llm_api.settings import Work
from llava_jax.llm_api.stop import Stopped, stopped_by_signals
from llava_jax.llm_api.thinking import says_nothing

Item = TypeVar("Item")

CUT, EMPTY = "cut off at --max-tokens", "empty"  # reasons why an answer does not count
LONGER = "give a larger --max-tokens and another --ledger"  # the way out where answers are cut off


class Task(NamedTuple):
    """A prompt, and the function that reads the answer.

    Attributes:
      name: identifies the task in the ledger.
      messages: makes the prompt when it is needed, since images take memory.
      read: returns the value of an answer, or None if the model has to be asked again.
      whole: whether an answer that was cut off does not count; else it is read as far as it goes. None: it does not
        count if the model thinks before other answers, since it may be thinking that was cut off.
    """

    name: str
    messages: Callable[[], Sequence[Message]]
    read: Callable[[str], Any]
    whole: bool | None = True


class Outcome(NamedTuple):
    """The value read from the last answer, or the reason why there is none.

    Attributes:
      text: the answer without its thinking.
      reason: empty if there is a value.
      open: whether the server failed with transient errors: the same command asks again.
      cut: whether the answer was cut off.
    """

    text: str | None
    value: Any
    reason: str = ""
    open: bool = False
    cut: bool = False

    @property
    def shown(self) -> str:
        """The text for files that keep the answers."""
        return self.text or f"no answer: {self.reason}"


def ask_all(work: Work, tasks: Sequence[Task], directory: Path, identity: dict[str, Any], what: str) -> list[Outcome]:
    """The outcome of each task. Answers that the ledger in `directory` holds are not paid again.

    Args:
      identity: must not change between runs with the same ledger; the model and its parameters are added to it.
      what: names the work in the progress.

    Raises:
      UserError: the ledger is of other work, no request can succeed, or the budget is spent. Answers until then are
        kept, as they are at Ctrl-C.
    """
    settings = work.settings
    ledger = Ledger(directory / "ledger.sqlite", settings.model, settings.body)
    try:
        ledger.identify({**identity, "model": settings.model, "body": settings.body})
        if ledger.open_batches() and not work.batch:
            raise UserError(f"{ledger.path}: answers of the batch API are awaited: resume with --batch")
        ask = _ask_in_batches if work.batch else _ask_singly
        outcomes = ask(work, tasks, ledger, what)
        if any(outcome.cut and task.whole is None for task, outcome in zip(tasks, outcomes, strict=True)):
            thinks = ledger.has_thinking()
            outcomes = [
                _next(ledger, task, work.attempts, thinks) if outcome.cut else outcome
                for task, outcome in zip(tasks, outcomes, strict=True)
            ]
        spent = ledger.totals()
    except sqlite3.OperationalError as error:  # as a full disk
        raise UserError(f"{ledger.path}: cannot be written ({error}); the same command resumes") from error
    finally:
        ledger.close()
    say(
        f"{what}: {spent.requests} requests of {spent.prompt_tokens:,} and {spent.completion_tokens:,} tokens, "
        f"${spent.cost:.4f}",
        file=sys.stderr,
    )
    return outcomes


def forecast(work: Work, tasks: Sequence[Task]) -> str:
    """The tokens and cost of asking about all tasks once, as one line."""
    prompt = sum(estimate_tokens(task.messages()) for task in tasks)
    completion = work.settings.max_completion_tokens * len(tasks)
    cost = work.settings.prices.cost(prompt, completion)
    asked = f"{len(tasks)} requests of about {prompt:,} tokens"
    if not work.settings.max_completion_tokens:
        return f"{asked}, about ${cost:.2f}, and answers without a limit: set max_tokens to know their cost"
    return f"{asked}, answers of up to {completion:,}: up to about ${cost:.2f}"


def told(outcomes: Sequence[Outcome]) -> str:
    """A note for the last line of a command: how many outcomes have no value for a reason that the user can change."""
    failed, cut = sum(outcome.open for outcome in outcomes), sum(outcome.reason == CUT for outcome in outcomes)
    notes = [f"{failed} as the server failed: the same command asks again"] if failed else []
    notes += [f"{cut} {CUT}: {LONGER}"] if cut else []
    return f" ({'; '.join(notes)})" if notes else ""


def ask_each(
    work: Work,
    ledger: Ledger,
    items: Iterable[Item],
    count: int,
    what: str,
    ask: Callable[[Client, Item], Awaitable[None]],
) -> int:
    """Calls `ask`, which sends single requests, for each of `count` items, many at a time.

    Returns the number of the signal that stopped it, 0 for none. Raises the first error of `ask`. Either way requests
    under way, which are paid for, are waited for.
    """
    items = iter(items)

    async def work_off(client: Client, done: asyncio.Queue[None]) -> None:
        try:
            for item in items:
                if client.stop.is_set():
                    return
                await ask(client, item)
                done.put_nowait(None)
                await asyncio.sleep(0)
        except Stopped:
            pass
        except BaseException:
            client.stop.set()
            raise

    async def show(done: asyncio.Queue[None]) -> None:
        for _ in track(range(count), what):
            await done.get()

    async def run() -> int:
        done: asyncio.Queue[None] = asyncio.Queue()
        async with Client(work.settings, ledger, Budget(work.budget, ledger.totals().cost)) as client:
            with stopped_by_signals(client.stop) as received:
                progress = asyncio.create_task(show(done))
                # Twice as many workers as connections: while some wait to try again, others use the connections.
                workers = [work_off(client, done) for _ in range(2 * work.settings.concurrency)]
                results = await asyncio.gather(*workers, return_exceptions=True)
                progress.cancel()
                await asyncio.wait([progress])
        for error in filter(None, results):
            raise error
        return received[0] if received else 0

    return asyncio.run(run())


def _ask_singly(work: Work, tasks: Sequence[Task], ledger: Ledger, what: str) -> list[Outcome]:
    outcomes: dict[str, Outcome] = {}

    async def ask(client: Client, task: Task) -> None:
        outcomes[task.name] = await _ask(client, task, work.attempts)

    if ask_each(work, ledger, tasks, len(tasks), what, ask) and len(outcomes) < len(tasks):
        raise KeyboardInterrupt
    return [outcomes[task.name] for task in tasks]


async def _ask(client: Client, task: Task, attempts: int) -> Outcome:
    task = task._replace(messages=functools.cache(task.messages))
    while isinstance(step := _next(client.ledger, task, attempts), Request):
        try:
            await client.ask(step)
        except Refused as error:
            return Outcome(None, None, str(error), open=error.reason == SERVER_ERROR)
    return step


def _ask_in_batches(work: Work, tasks: Sequence[Task], ledger: Ledger, what: str) -> list[Outcome]:
    by_name = {task.name: task for task in tasks}
    given_up: dict[str, str] = {}

    def next_of(name: str) -> Request | Outcome:
        if name not in by_name:
            what = f"awaits an answer to {name}, which is not asked here"
            raise UserError(f"{ledger.path}: {what}; choose another directory")
        if name in given_up:
            return Outcome(None, None, f"{REFUSED}: {given_up[name]}")
        step = _next(ledger, by_name[name], work.attempts)
        if isinstance(step, Request) and ledger.failures(step) >= TRIES:
            return Outcome(None, None, f"{SERVER_ERROR}: {TRIES} tries failed", open=True)
        return step

    def requests(refused: dict[str, str]) -> Iterator[Request]:
        given_up.update(refused)
        return (step for name in by_name if isinstance(step := next_of(name), Request))

    run_batches(work, ledger, next_of, requests, f"{what}: ")
    return [next_of(name) for name in by_name]


def _next(ledger: Ledger, task: Task, attempts: int, thinks: bool = False) -> Request | Outcome:
    """The next request after the answers in the ledger, or the outcome of these.

    Args:
      thinks: whether the model thinks before its answers: one that was cut off in a thought may look like an answer.
    """
    messages, outcome = task.messages(), Outcome(None, None)
    for attempt in range(attempts):
        request = Request(task.name, attempt, messages)
        if (answer := ledger.answer(request)) is None:
            return request
        whole = task.whole if task.whole is not None else thinks and not answer.thought
        reason = no_answer(answer, whole)
        value = None if reason else task.read(answer.text)
        why = reason or ("" if value is not None else "of another form")
        outcome = Outcome(answer.text, value, why, cut=answer.finish_reason == CUT_OFF)
        if value is not None or reason == CUT:  # the same limit would cut another answer, too
            break
    return outcome


def no_answer(answer: Answer, whole: bool = True) -> str:
    """Why an answer does not count; empty if it does."""
    if answer.finish_reason == FILTERED:
        return f"stopped by a filter: {answer.text or ''}".rstrip(": ")
    if answer.finish_reason == CUT_OFF and (whole or not answer.text):
        return CUT
    return EMPTY if says_nothing(answer.text or "") else ""

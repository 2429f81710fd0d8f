"""Asks a model all of many tasks, each until an answer to it can be read, and goes on where an earlier run ended."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava_jax.cli import UserError, track
from llava_jax.llm_api.client import Client, Refused, Settings, Stopped
from llava_jax.llm_api.cost import Budget, Message, estimate_tokens
from llava_jax.llm_api.ledger import Ledger, Request


class Task(NamedTuple):
    """A prompt, and what reads the answer to it: None where it's no good and another is wanted."""

    name: str
    messages: Sequence[Message]
    read: Callable[[str], Any]


class Outcome(NamedTuple):
    """The last answer and what was read from it: None where none was any good, or the server refused the prompt."""

    text: str
    value: Any


class Work(NamedTuple):
    """Whom to ask, and what may be spent."""

    settings: Settings
    budget: float | None = None  # dollars
    attempts: int = 3  # answers of which one has to be good


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
        outcomes = asyncio.run(_ask_all(work, tasks, ledger, what))
        spent = ledger.totals()
    finally:
        ledger.close()
    print(
        f"{what}: {spent.requests} requests of {spent.prompt_tokens:,} and {spent.completion_tokens:,} tokens, "
        f"${spent.cost:.4f}",
        file=sys.stderr,
    )
    return outcomes


def forecast(work: Work, tasks: Sequence[Task]) -> str:
    """What asking all would cost, without an answer that has to be asked for again."""
    prompt = sum(estimate_tokens(task.messages) for task in tasks)
    completion = work.settings.most_completion_tokens * len(tasks)
    cost = work.settings.prices.cost(prompt, completion)
    return f"{len(tasks)} requests of about {prompt:,} tokens, answers of up to {completion:,}: up to about ${cost:.2f}"


async def _ask_all(work: Work, tasks: Sequence[Task], ledger: Ledger, what: str) -> list[Outcome]:
    client = Client(work.settings, ledger, Budget(work.budget, ledger.totals().cost))
    running = [asyncio.create_task(_ask(client, task, work.attempts)) for task in tasks]
    async with client.api:
        try:
            with _stopped_by_signals(client):
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
    text = ""
    for attempt in range(attempts):
        try:
            text = (await client.ask(Request(task.name, attempt, task.messages))).text
        except Refused as error:
            return Outcome(str(error), None)
        if (value := task.read(text)) is not None:
            return Outcome(text, value)
    return Outcome(text, None)


@contextlib.contextmanager
def _stopped_by_signals(client: Client) -> Iterator[None]:
    """Within, Ctrl-C and SIGTERM end the work once the answers under way are there."""
    loop, numbers = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, client.stop.set)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)

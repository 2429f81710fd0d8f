"""The batch API: requests are uploaded in files and answers downloaded within a day, at about half the price.

The requests and the name of a batch are in the ledger before anything is sent. If a process dies before it has noted
the server's id of a batch, the next process finds that batch on the server by its name.
"""

import asyncio
import itertools
import json
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

import httpx2
import openai

from llava_jax.cli import UserError, say
from llava_jax.files.reading import loads
from llava_jax.llm_api.advice import advice
from llava_jax.llm_api.budget import BudgetSpent
from llava_jax.llm_api.errors import PERMANENT, ServerError, TransientError, server_error
from llava_jax.llm_api.ledger import Batch, Ledger, Request
from llava_jax.llm_api.replies import read_completion
from llava_jax.llm_api.retry import backoff
from llava_jax.llm_api.settings import Work, connect
from llava_jax.llm_api.transport import first_cause

MAX_REQUESTS, MAX_BYTES = 50_000, 190 * 10**6  # of a batch; OpenAI accepts 50,000 and 200 MB
ENDED = ("completed", "failed", "expired", "cancelled")
NAME = "llava_jax"  # the field of a batch's metadata that holds its name
CLOCKS = 3600.0  # seconds that a server's clock may be behind ours
TRIES = 5  # of an upload, and of a request in batches
ERRORS = (openai.APIError, httpx2.HTTPError)  # the latter where a response is cut off


def run_batches(
    work: Work,
    ledger: Ledger,
    request_of: Callable[[str], Request],
    requests: Callable[[dict[str, str]], Iterable[Request]],
    prefix: str = "",
) -> None:
    """Sends rounds of batches until no request is left, and notes the answers in the ledger.

    Args:
      request_of: returns the next request of a task: the one in a batch, as long as it has no answer.
      requests: returns the requests of the next round. Its argument has the tasks whose requests the server refused
        in the last one, and the reasons.
      prefix: of the lines that report the rounds.
    """

    async def rounds() -> None:
        batches = Batches(work, ledger, request_of)
        async with batches.api:
            refused = await batches.collect()  # of an earlier run
            while held := batches.make(requests(refused)):
                what = f"{held} requests go out in batches; interrupted, the same command resumes"
                say(f"{prefix}{what}", file=sys.stderr)
                refused = await batches.collect()

    asyncio.run(rounds())


class Batches:
    """Makes, sends and collects batches of one server; see `run_batches`."""

    def __init__(self, work: Work, ledger: Ledger, request_of: Callable[[str], Request]):
        if work.budget is not None:
            work.settings.check_budget()
        self.settings, self.budget, self.poll = work.settings, work.budget, work.poll
        self.ledger, self.request_of = ledger, request_of
        self.api = connect(work.settings)

    def make(self, requests: Iterable[Request]) -> int:
        """Notes the batches that hold the requests, as far as the budget allows. Returns the number of these requests.

        Raises `BudgetSpent` if the budget does not allow one.
        """
        spent, held, count, size = self.ledger.totals().cost, 0, MAX_REQUESTS, 0
        unpaid = None
        with self.ledger.transaction():
            for request in requests:
                worst = self.settings.max_cost(request)
                if self.budget is not None and spent + worst > self.budget:
                    unpaid = worst
                    break
                length = len(self._line(0, request)) + 20
                if count == MAX_REQUESTS or size + length > MAX_BYTES:
                    number, count, size = self.ledger.add_batch(secrets.token_hex(16)), 0, 0
                self.ledger.begin(request, worst, number)
                spent, held, count, size = spent + worst, held + 1, count + 1, size + length
        if unpaid is not None and not held:
            raise BudgetSpent(spent, self.budget, unpaid)
        return held

    async def collect(self) -> dict[str, str]:
        """Sends the batches that were not sent yet, and waits until the answers of all are in the ledger.

        Returns:
          The tasks whose requests the server refuses, while it answers others, and the reasons.

        Raises:
          UserError: the server accepts no request.
        """
        refused: dict[str, str] = {}
        for batch in self.ledger.open_batches():
            if batch.id is None:
                self.ledger.note_batch(batch.number, await self._send(batch))
        failing_since = None
        while batches := self.ledger.open_batches():
            try:
                for batch in batches:
                    refused |= await self._collect(batch)
                failing_since = None
            except ERRORS as error:  # within a day a network may fail for a while
                failing_since = failing_since or time.monotonic()
                if _permanent(error) or time.monotonic() - failing_since > self.settings.patience:
                    raise self._error(error) from error
                say(f"{self.api.base_url}: {first_cause(error)}; looks again in {self.poll:.0f} s", file=sys.stderr)
            if self.ledger.open_batches():
                await asyncio.sleep(self.poll)
        if refused and not self.ledger.answer_count():
            raise UserError(f"{self.api.base_url}: {next(iter(refused.values()))}")
        return refused

    # ------------------------------------------------------------------------------------------------------ sending

    async def _send(self, batch: Batch) -> str:
        """The server's id of a batch, which is created unless the server has it: a failed try may have created it."""
        for failures in itertools.count(1):
            try:
                return await self._find(batch) or await self._create(batch)
            except ERRORS as error:
                if failures == TRIES or _permanent(error):
                    raise self._error(error) from error
                await asyncio.sleep(backoff(failures))

    async def _find(self, batch: Batch) -> str | None:
        async for found in self.api.batches.list(limit=100):
            if (found.metadata or {}).get(NAME) == batch.name:
                return found.id
            if found.created_at < batch.made - CLOCKS:  # newest first
                break
        return None

    async def _create(self, batch: Batch) -> str:
        with tempfile.TemporaryFile() as file:
            for row, task in self.ledger.batched(batch.number):
                file.write(self._line(row, self.request_of(task)))
            file.seek(0)
            uploaded = await self.api.files.create(file=(f"{batch.name}.jsonl", file), purpose="batch")
        created = await self.api.batches.create(
            input_file_id=uploaded.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={NAME: batch.name},
        )
        return created.id

    def _line(self, row: int, request: Request) -> bytes:
        body = {"model": self.settings.model, "messages": request.messages, **self.settings.body}
        line = {"custom_id": str(row), "method": "POST", "url": "/v1/chat/completions", "body": body}
        return json.dumps(line).encode() + b"\n"

    # --------------------------------------------------------------------------------------------------- collecting

    async def _collect(self, batch: Batch) -> dict[str, str]:
        """Notes all answers of a batch that has ended, in one transaction. Returns the refused tasks."""
        try:
            state = await self.api.batches.retrieve(batch.id)
            if state.status not in ENDED:
                return {}
            with tempfile.TemporaryFile() as file:
                for id in filter(None, (state.output_file_id, state.error_file_id)):
                    await self._download(id, file)
                file.seek(0)
                refused = self._note(batch, file, state.status)
        except openai.NotFoundError as error:
            raise UserError(
                f"{self.api.base_url}: knows no batch {batch.id} or its files: they are to be had where, and with the "
                "key with which, they were made; if they were deleted there, choose another directory"
            ) from error
        if state.status in ("failed", "cancelled"):
            errors = "; ".join(f"{error.message}" for error in (state.errors and state.errors.data) or ())
            raise UserError(
                f"{self.api.base_url}: batch {batch.id} {state.status} ({errors or 'no reason is given'}); "
                "the same command makes another"
            )
        return refused

    async def _download(self, id: str, file: IO[bytes]) -> None:
        async with self.api.files.with_streaming_response.content(id) as response:
            async for part in response.iter_bytes():
                file.write(part)
        file.write(b"\n")

    def _note(self, batch: Batch, lines: Iterable[bytes], status: str) -> dict[str, str]:
        """Raises `UserError` if the server accepted no request at all, which may succeed later."""
        refused: dict[str, str] = {}
        rejected: list[ServerError] = []
        tasks = dict(self.ledger.batched(batch.number))
        count = len(tasks)
        with self.ledger.transaction():
            for row, response in _responses(lines):
                if task := tasks.pop(row, None):
                    try:
                        self._note_response(row, self.request_of(task), response)
                    except ServerError as error:
                        if error.rate_limited or error.permanent:
                            rejected.append(error)  # its row counts as never sent
                            continue
                        self.ledger.failed(row, str(error), 0.0)
                        if not error.transient:
                            refused[task] = f"{str(error).rstrip('.')}{advice(error, self.settings)}"
            for row in tasks if status == "completed" else ():  # the server would not answer them next time either
                self.ledger.failed(row, "the batch was completed without it", 0.0)
            self.ledger.close_batch(batch.number, f"batch {status} without it")
        if rejected and (len(rejected) == count or rejected[-1].permanent):
            raise UserError(f"{self.api.base_url}: {rejected[-1]}; the same command resumes")
        return refused

    def _note_response(self, row: int, request: Request, response: dict[str, Any]) -> None:
        """Raises `ServerError` if the response is one."""
        status, body = response.get("status_code"), response.get("body")
        status = int(status) if str(status).isdecimal() else None  # some servers write it as text
        if status != 200:
            raise server_error(body, status)
        try:
            answer = read_completion(body, request.messages, self.settings.max_completion_tokens)
        except TransientError as error:
            self.ledger.failed(row, str(error), self.settings.max_cost(request))
            return
        self.ledger.answered(row, answer, self.settings.prices.cost(answer.prompt_tokens, answer.completion_tokens))

    def _error(self, error: Exception) -> UserError:
        return UserError(f"{self.api.base_url}: {first_cause(error)}; the same command resumes")


def _permanent(error: Exception) -> bool:
    return getattr(error, "status_code", 500) in (*PERMANENT, 400)


def _responses(lines: Iterable[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Row and response of each line. A line without them counts as not answered."""
    for line in lines:
        try:
            value = loads(line, strict=False)
            row, response = int(value["custom_id"]), value.get("response") or {"body": value.get("error")}
        except (ValueError, LookupError, TypeError, AttributeError):
            continue
        if isinstance(response, dict):
            yield row, response

"""The batch API: requests go up in files, and within a day the answers come down in files, at half the price or so.

Rows of the ledger and the name of a batch are written before anything is sent. A process that dies between sending and
noting the server's id leaves a batch that the next one finds among the server's by its name.
"""

import asyncio
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
from llava_jax.llm_api.client import Settings, api, backoff, first_cause, way_out
from llava_jax.llm_api.cost import budget_spent
from llava_jax.llm_api.ledger import Batch, Ledger, Request
from llava_jax.llm_api.replies import PERMANENT, NoAnswer, ServerError, read_completion, server_error

MOST_REQUESTS, MOST_BYTES = 50_000, 190 * 10**6  # of a batch; OpenAI takes 50,000 and 200 MB
ENDED = ("completed", "failed", "expired", "cancelled")
NAME = "llava_jax"  # of the metadata that hold a batch's name
CLOCKS = 3600.0  # seconds that a server's clock may be behind ours
TRIES = 5  # of whatever fails on the way
ERRORS = (openai.APIError, httpx2.HTTPError)  # the latter where an answer stops on the way


class Batches:
    """Sends requests in batches and notes their answers in the ledger.

    `request_of` gives the request of a task that is next: the one that is in a batch, as long as it has no answer.
    """

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        budget: float | None,
        request_of: Callable[[str], Request],
        poll: float = 60.0,
    ):
        self.settings, self.ledger, self.budget, self.poll = settings, ledger, budget, poll
        self.request_of = request_of
        self.api = api(settings)

    async def __aenter__(self) -> "Batches":
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.api.close()

    def make(self, requests: Iterable[Request]) -> int:
        """Notes as many batches as the requests need, and the budget allows. Returns how many requests they hold.

        Raises `BudgetSpent` where it does not allow one.
        """
        spent, held, count, size = self.ledger.totals().cost, 0, MOST_REQUESTS, 0
        unpaid = None
        with self.ledger.transaction():
            for request in requests:
                worst = self.settings.worst_cost(request)
                if self.budget is not None and spent + worst > self.budget:
                    unpaid = worst
                    break
                length = len(self._line(0, request)) + 20
                if count == MOST_REQUESTS or size + length > MOST_BYTES:
                    number, count, size = self.ledger.add_batch(secrets.token_hex(16)), 0, 0
                self.ledger.begin(request, worst, number)
                spent, held, count, size = spent + worst, held + 1, count + 1, size + length
        if unpaid is not None and not held:
            raise budget_spent(spent, self.budget, unpaid)
        return held

    async def collect(self) -> dict[str, str]:
        """Sends the batches that were not sent yet, and waits until the answers of all are in the ledger.

        Returns:
          The tasks whose requests the server refuses for good, while it answers others, and why.

        Raises:
          UserError: where the server takes none.
        """
        refused: dict[str, str] = {}
        for batch in self.ledger.open_batches():
            if batch.id is None:
                self.ledger.note_batch(batch.number, await self._send(batch))
        seen = time.monotonic()
        while batches := self.ledger.open_batches():
            try:
                for batch in batches:
                    refused |= await self._collect(batch)
                seen = time.monotonic()
            except ERRORS as error:  # days are long enough for a network to be away for a while
                if _for_good(error) or time.monotonic() - seen > self.settings.patience:
                    raise self._error(error) from error
                say(f"{self.api.base_url}: {first_cause(error)}; looks again in {self.poll:.0f} s", file=sys.stderr)
            if self.ledger.open_batches():
                await asyncio.sleep(self.poll)
        if refused and not self.ledger.answer_count():
            raise UserError(f"{self.api.base_url}: {next(iter(refused.values()))}")
        return refused

    # ------------------------------------------------------------------------------------------------------ sending

    async def _send(self, batch: Batch) -> str:
        """The server's id of a batch, which it gets if it has none. A try that brought nothing may have made it."""
        failures = 0
        while True:
            try:
                return await self._find(batch) or await self._create(batch)
            except ERRORS as error:
                failures += 1
                if failures == TRIES or _for_good(error):
                    raise self._error(error) from error
                await asyncio.sleep(backoff(failures))

    async def _find(self, batch: Batch) -> str | None:
        async for found in self.api.batches.list(limit=100):
            if (found.metadata or {}).get(NAME) == batch.name:
                return found.id
            if found.created_at < batch.made - CLOCKS:  # the newest come first
                break
        return None

    async def _create(self, batch: Batch) -> str:
        with tempfile.TemporaryFile() as file:
            for row, task in self.ledger.batched(batch.number):
                file.write(self._line(row, self.request_of(task)))
            file.seek(0)
            uploaded = await self.api.files.create(file=(f"{batch.name}.jsonl", file), purpose="batch")
        made = await self.api.batches.create(
            input_file_id=uploaded.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={NAME: batch.name},
        )
        return made.id

    def _line(self, row: int, request: Request) -> bytes:
        body = {"model": self.settings.model, "messages": request.messages, **self.settings.body}
        line = {"custom_id": str(row), "method": "POST", "url": "/v1/chat/completions", "body": body}
        return json.dumps(line).encode() + b"\n"

    # --------------------------------------------------------------------------------------------------- collecting

    async def _collect(self, batch: Batch) -> dict[str, str]:
        """Notes all answers of a batch, in one transaction, if it has come to its end. Returns what is refused."""
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
        """Raises `UserError` where the server took no request at all, which may succeed later."""
        refused: dict[str, str] = {}
        turned_away: list[ServerError] = []
        tasks = dict(self.ledger.batched(batch.number))
        count = len(tasks)
        with self.ledger.transaction():
            for row, response in _responses(lines):
                if task := tasks.pop(row, None):
                    try:
                        self._note_response(row, self.request_of(task), response)
                    except ServerError as error:
                        if error.of_rate or error.permanent:
                            turned_away.append(error)  # its row is as good as never sent
                            continue
                        self.ledger.failed(row, str(error), 0.0)
                        if not error.transient:
                            refused[task] = f"{str(error).rstrip('.')}{way_out(error, self.settings)}"
            self.ledger.close_batch(batch.number, f"batch {status} without it")
        if turned_away and (len(turned_away) == count or turned_away[-1].permanent):
            raise UserError(f"{self.api.base_url}: {turned_away[-1]}; the same command goes on")
        return refused

    def _note_response(self, row: int, request: Request, response: dict[str, Any]) -> None:
        """Raises `ServerError` where the response is one."""
        status, body = response.get("status_code"), response.get("body")
        status = int(status) if str(status).isdecimal() else None  # some write it as text
        if status != 200:
            raise server_error(body, status)
        try:
            answer = read_completion(body, request.messages, self.settings.most_completion_tokens)
        except NoAnswer as error:
            self.ledger.failed(row, str(error), self.settings.worst_cost(request))
            return
        self.ledger.answered(row, answer, self.settings.prices.cost(answer.prompt_tokens, answer.completion_tokens))

    def _error(self, error: Exception) -> UserError:
        return UserError(f"{self.api.base_url}: {first_cause(error)}; the same command goes on")


def _for_good(error: Exception) -> bool:
    return getattr(error, "status_code", 500) in (*PERMANENT, 400)


def _responses(lines: Iterable[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Row and response of each line; what is none counts as not answered."""
    for line in lines:
        try:
            value = loads(line, strict=False)
            row, response = int(value["custom_id"]), value.get("response") or {"body": value.get("error")}
        except (ValueError, LookupError, TypeError, AttributeError):
            continue
        if isinstance(response, dict):
            yield row, response

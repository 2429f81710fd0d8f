"""Asks a language model behind an OpenAI-compatible API, as fast as it takes requests, until it answers."""

import asyncio
import email.utils
import hashlib
import json
import math
import random
import re
import sys
import time
from collections.abc import Awaitable, Iterator, Mapping
from typing import Any, NamedTuple

import aiohttp
import httpx2
import openai

from llava_jax.cli import UserError, say
from llava_jax.llm_api.cost import Budget, Prices, estimate_tokens, most_tokens
from llava_jax.llm_api.ledger import Answer, Ledger, Request
from llava_jax.llm_api.limits import RateLimit, Refusal
from llava_jax.llm_api.replies import NoAnswer, ServerError, read_completion, read_json, server_error, whole_completion

BACKOFF, LONGEST_BACKOFF = 0.5, 60.0  # seconds
LONG = 60.0  # seconds of waiting that are worth a word
ANSWER_LENGTH = re.compile(r"max_\w*tokens|context.length|\bcontext\b", re.IGNORECASE)  # what errors about it name
TOO_LONG = re.compile(r"too (large|many|long|high)|context|at most|less than|exceed|reduce", re.IGNORECASE)
TOO_SHORT = re.compile(r"too (small|low)|at least|minimum|greater than|higher|larger", re.IGNORECASE)
ODD_ADDRESS = re.compile(r"://[^/]+/?$|/(chat/)?completions/?$")  # without a path, or with that of the request
NO_SYSTEM = re.compile(r"system.{0,9} role|role.{0,40}\bsystem\b|system (message|prompt)s? (is|are) not", re.IGNORECASE)
REFUSED, SERVER_ERROR = "refused-by-server", "server-error"  # of a prompt, for good or for a while


class Settings(NamedTuple):
    """How to ask. `body` has what goes into every request besides model and messages, max_tokens among them."""

    model: str
    body: dict[str, Any]
    base_url: str | None = None
    api_key: str | None = None
    concurrency: int = 64
    requests_a_minute: float | None = None
    tokens_a_minute: float | None = None
    prices: Prices = Prices(0.0, 0.0)
    stream: bool = False
    timeout: float = 600.0  # seconds for an answer
    tries: int = 8  # before a request counts as failed; refusals for the rate are no tries
    patience: float = 900.0  # seconds without any answer, with refusals only, before giving up

    @property
    def most_completion_tokens(self) -> int:
        return self.body.get("max_completion_tokens") or self.body.get("max_tokens") or 0

    def worst_cost(self, request: Request) -> float:
        """Dollars that it may cost at most."""
        return self.prices.cost(most_tokens(request.messages), self.most_completion_tokens)


class Stopped(Exception):
    """Asked to stop while waiting."""


class Refused(Exception):
    """The server does not take this prompt, or fails at it again and again, while it answers others."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class Client:
    """Every request goes through the ledger. One answer to a request is all that is ever paid, wherever it is known.

    `async with` closes its connections.
    """

    def __init__(self, settings: Settings, ledger: Ledger, budget: Budget):
        self.settings, self.ledger, self.budget = settings, ledger, budget
        self.limit = RateLimit(settings.requests_a_minute, settings.tokens_a_minute)
        if budget.limit is not None and not settings.most_completion_tokens:
            raise UserError("a budget needs max_tokens in the requests: without it no answer has a highest price")
        self.api = api(settings)
        self._rest = json.dumps({"model": settings.model, **settings.body}).encode()[1:]  # of a body, behind messages
        self._slots = asyncio.Semaphore(settings.concurrency)
        self.stop = asyncio.Event()
        self.answered_at = time.monotonic()
        self._turn = asyncio.Lock()  # who waits for the rate waits in line
        self._refusals = 0  # in a row

    async def ask(self, request: Request) -> Answer:
        """The answer without its thinking: the ledger's, if it has one. A request must not be asked twice at a time.

        Raises `Stopped`, `Refused`, `BudgetSpent`, or `UserError` where no request can succeed.
        """
        if answer := self.ledger.answer(request):
            return answer
        begin = time.monotonic()
        failures = 0
        while True:
            try:
                async with self._slots:
                    return (await self._try(request)).after_thinking()
            except NoAnswer as failure:
                if failure.refusal:
                    self._check_patience(failure)
                    continue
                failures += 1
                if failures >= self.settings.tries:
                    if self.answered_at > begin:
                        raise Refused(SERVER_ERROR, str(failure)) from failure
                    raise UserError(
                        f"{self.api.base_url}: gives no answer ({failure}); the same command goes on"
                    ) from failure
                await self.unless_stopped(asyncio.sleep(backoff(failures)))

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.api.close()

    async def _try(self, request: Request) -> Answer:
        worst = self.settings.worst_cost(request)
        tokens = estimate_tokens(request.messages) + self.settings.most_completion_tokens
        while not self.budget.reserve(worst):
            await self.unless_stopped(self.budget.settled())
        row, cost = None, 0.0
        try:
            await self._await_turn(tokens)
            row, cost = self.ledger.begin(request, worst), worst
            answer = await self._send(request)
            cost = self.settings.prices.cost(answer.prompt_tokens, answer.completion_tokens)
            self.ledger.answered(row, answer, cost)
            self.answered_at, self._refusals = time.monotonic(), 0
            return answer
        except (NoAnswer, Refused, UserError) as error:
            cost = worst if isinstance(error, NoAnswer) and error.charged else 0.0
            if row is not None:
                self.ledger.failed(row, str(error), cost)
            if isinstance(error, NoAnswer) and error.refusal:
                self.limit.refuse(time.monotonic(), error.refusal, tokens)
            raise
        except asyncio.CancelledError:
            if row is not None:
                self.ledger.failed(row, "given up while under way; whether it was charged is unknown", cost)
            raise
        finally:
            self.budget.settle(worst, cost)

    async def _await_turn(self, tokens: int) -> None:
        async with self._turn:
            while not self.stop.is_set():
                seconds = self.limit.wait(time.monotonic(), tokens)
                if seconds <= 0:
                    return
                if seconds > LONG:
                    say(f"{self.api.base_url}: the next request goes out in {seconds:.0f} s", file=sys.stderr)
                await self.unless_stopped(asyncio.sleep(seconds))
        raise Stopped

    async def unless_stopped(self, awaitable: Awaitable[None]) -> None:
        """Awaits, unless the client is stopped before: then raises `Stopped`."""
        waiting, stopping = asyncio.ensure_future(awaitable), asyncio.ensure_future(self.stop.wait())
        try:
            await asyncio.wait((waiting, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise Stopped
            waiting.result()
        finally:
            waiting.cancel()
            stopping.cancel()

    def _check_patience(self, failure: NoAnswer) -> None:
        if time.monotonic() - self.answered_at > self.settings.patience:
            raise UserError(
                f"{self.api.base_url}: only refusals for {self.settings.patience:.0f} s ({failure}); "
                "the same command goes on"
            ) from failure

    # -------------------------------------------------------------------------------------------------- one try

    async def _send(self, request: Request) -> Answer:
        headers: Mapping[str, str] = {}
        try:
            async with asyncio.timeout(self.settings.timeout):
                completion, headers = await (self._streamed if self.settings.stream else self._whole)(request)
            return read_completion(completion, request.messages, self.settings.most_completion_tokens)
        except ServerError as error:
            raise self._failure(error, headers) from error
        except openai.APIStatusError as error:
            told = server_error(error.body or error.message, error.status_code)
            raise self._failure(told, error.response.headers) from error
        except (openai.APIError, httpx2.HTTPError, TimeoutError, ValueError) as error:  # cut off, too late, no JSON
            if body := getattr(error, "body", None):  # in the middle of a stream, of which some may be charged
                failure = self._failure(server_error(body), headers)
                failure.charged = isinstance(failure, NoAnswer) and not failure.refusal
                raise failure from error
            raise NoAnswer(first_cause(error), charged=not _never_sent(error)) from error

    async def _whole(self, request: Request) -> tuple[Any, Mapping[str, str]]:
        """A completion, and the headers that it came with."""
        # As chat.completions.create, which looks at all messages and the answer for longer than all the rest takes.
        response = await self.api.post(
            "/chat/completions",
            cast_to=httpx2.Response,
            content=b'{"messages": %b, %b' % (request.messages_json, self._rest),
            options={"headers": self._headers(request)},
        )
        return read_json(response.content), response.headers

    async def _streamed(self, request: Request) -> tuple[Any, Mapping[str, str]]:
        """The same of a streamed answer, put together as if it had come whole."""
        async with await self.api.post(
            "/chat/completions",
            cast_to=object,
            content=b'{"messages": %b, "stream": true, "stream_options": {"include_usage": true}, %b'
            % (request.messages_json, self._rest),
            options={"headers": self._headers(request)},
            stream=True,
            stream_cls=openai.AsyncStream[object],
        ) as stream:
            headers = stream.response.headers
            if "event-stream" not in headers.get("content-type", "event-stream"):  # an error, or it does not stream
                return read_json(await stream.response.aread()), headers
            return whole_completion([chunk async for chunk in stream]), headers

    def _headers(self, request: Request) -> dict[str, str]:
        return {"Idempotency-Key": idempotency_key(self.settings.model, request)}

    def _failure(self, error: ServerError, headers: Mapping[str, str]) -> Exception:
        """What an error by the server comes to: another try, this prompt's refusal, or the end of all."""
        if error.of_rate:
            self._refusals += self.limit.pause is None
            wait = retry_after(headers)
            wait = backoff(self._refusals) if wait is None else wait
            return NoAnswer(error, refusal=Refusal(wait, _of_tokens(error, headers)))
        if error.transient:
            return NoAnswer(error)
        if error.permanent or not error.filtered and not self.ledger.answer_count():
            return UserError(f"{self.api.base_url}: {str(error).rstrip('.')}{way_out(error, self.settings)}")
        return Refused(REFUSED, str(error))


def way_out(error: ServerError, settings: Settings) -> str:
    """What mends a refused parameter, of those that are sent; empty where the error names none."""
    text, body = str(error), settings.body | ({"stream": True, "stream_options": {}} if settings.stream else {})
    limit = next((name for name in ("max_completion_tokens", "max_tokens") if name in body), "")
    if limit and ANSWER_LENGTH.search(f"{error.parameter} {error.code} {text}"):
        option = "--max-tokens" if limit == "max_tokens" else f"{limit} in --body"
        for size, words in (("smaller", TOO_LONG), ("larger", TOO_SHORT)):
            if words.search(text):
                return f": give a {size} {option}"
    if error.status == 404 and ODD_ADDRESS.search(settings.base_url or ""):
        return ": is the address right? It ends with /v1, as http://localhost:8000/v1"
    if error.status not in (400, 422):
        return ""
    named = [name for name in body if name == error.parameter or re.search(rf"\b{re.escape(name)}\b", text)]
    if not named:
        return ": the model takes no system prompt, as this command sends" if NO_SYSTEM.search(text) else ""
    changes: dict[str, Any] = dict.fromkeys(named)
    if {"temperature", "top_p"} <= changes.keys():  # which some models take one by one
        del changes["temperature"]
    if "stream_options" in changes:
        changes = {"stream": None}
    if "max_tokens" in changes:
        changes["max_completion_tokens"] = body.get("max_completion_tokens", body["max_tokens"])
    elif "max_completion_tokens" in changes:
        changes["max_tokens"] = body["max_completion_tokens"]
    return f": add --body '{json.dumps(changes)}'"


def api(settings: Settings) -> openai.AsyncOpenAI:
    """The official client; the repetitions are ours, since the ledger and the rate must see them."""
    try:
        return openai.AsyncOpenAI(
            base_url=settings.base_url,
            api_key=settings.api_key,
            max_retries=0,
            timeout=settings.timeout,
            http_client=openai.DefaultAioHttpClient(),  # less work a request than httpx
        )
    except openai.OpenAIError as error:
        raise UserError(f"{error}") from error


def idempotency_key(model: str, request: Request) -> str:
    """The same for every try of a request, also by later processes: gateways that know such keys charge it once."""
    return hashlib.sha256(json.dumps([model, request.task, request.attempt, request.prompt_hash]).encode()).hexdigest()


def backoff(failures: int) -> float:
    """Seconds to wait after so many failures, with full jitter."""
    return random.uniform(0.1, 1.0) * min(LONGEST_BACKOFF, BACKOFF * 2**failures)


def retry_after(headers: Any) -> float | None:
    """Seconds that the server wants to be left alone: from milliseconds, seconds or a date; None where it says none."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * unit
        except (KeyError, ValueError):
            continue
        return max(0.0, seconds) if math.isfinite(seconds) else None
    date = email.utils.parsedate_tz(headers.get("retry-after"))
    return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else None


def _of_tokens(error: ServerError, headers: Mapping[str, str]) -> bool:
    return headers.get("x-ratelimit-remaining-tokens") == "0" or "tokens per min" in str(error)


def first_cause(error: BaseException) -> str:
    """What went wrong at first, in one line."""
    *_, first = _causes(error)
    return " ".join(f"{type(first).__name__}: {first}".split())


def _never_sent(error: BaseException) -> bool:
    """Whether there was no connection at all; one that the server closes may have carried a request."""
    return any(
        isinstance(cause, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError) for cause in _causes(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error:
        yield error
        error = error.__cause__

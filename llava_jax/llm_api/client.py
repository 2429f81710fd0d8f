"""The client of a language model behind an OpenAI-compatible API: as many requests at a time as the server takes.

A request passes through layers, each of which has one job and a file of its own:

  ledger        has the answer already: nothing is sent
  retry         tries again after transient errors
  slots         how many tries are under way at a time
  budget        reserves what a try can cost at most
  rate limiter  waits until the server accepts another try
  ledger        notes the try before it is sent, and its answer or error
  transport     sends the request over HTTP
"""

import asyncio
import functools
from typing import Any

from llava_jax.cli import UserError
from llava_jax.llm_api.advice import advice
from llava_jax.llm_api.budget import Budget, Reservation
from llava_jax.llm_api.cost import estimate_tokens
from llava_jax.llm_api.errors import REFUSED, Refused, ServerError, TransientError
from llava_jax.llm_api.ledger import Answer, Ledger, Request
from llava_jax.llm_api.rate_limit import RateLimiter
from llava_jax.llm_api.retry import Retry
from llava_jax.llm_api.settings import Settings
from llava_jax.llm_api.stop import Stop
from llava_jax.llm_api.transport import Transport


class Client:
    """Answers requests from the ledger or by the server; no request is paid twice. `async with` closes it."""

    def __init__(self, settings: Settings, ledger: Ledger, budget: Budget):
        if budget.limit is not None:
            settings.check_budget()
        self.settings, self.ledger, self.budget, self.stop = settings, ledger, budget, Stop()
        self.transport = Transport(settings)
        server = self.transport.server
        self.retry = Retry(server, settings.tries, settings.patience, self.stop)
        self.rate = RateLimiter(server, settings.requests_a_minute, settings.tokens_a_minute, self.stop)
        self._slots = asyncio.Semaphore(settings.concurrency)

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.transport.close()

    async def ask(self, request: Request) -> Answer:
        """The answer without its thinking. The same request must not be asked twice at a time.

        Raises:
          Refused: the server does not answer this request, while it answers others.
          Stopped: `stop` was set before the request was sent.
          BudgetSpent: the request could cost more than is left.
          UserError: no request can succeed.
        """
        if answer := self.ledger.answer(request):
            return answer
        answer = await self.retry.until_answered(functools.partial(self._try, request))
        return answer.after_thinking()

    async def _try(self, request: Request) -> Answer:
        tokens = estimate_tokens(request.messages) + self.settings.max_completion_tokens
        async with self._slots, self.budget.reserve(self.settings.max_cost(request), self.stop) as reservation:
            await self.rate.turn(tokens)
            try:
                answer = await self._send(request, reservation)
            except TransientError as error:
                if error.refusal:
                    self.rate.refused(error.refusal, tokens)
                raise
            self.rate.answered()
            return answer

    async def _send(self, request: Request, reservation: Reservation) -> Answer:
        """Sends a request and notes it in the ledger."""
        row = self.ledger.begin(request, reservation.dollars)
        reservation.cost = reservation.dollars  # until more is known
        try:
            answer = await self.transport.send(request)
        except (TransientError, ServerError) as error:
            error = self._classified(error) if isinstance(error, ServerError) else error
            charged = isinstance(error, TransientError) and error.charged
            reservation.cost = reservation.dollars if charged else 0.0
            self.ledger.failed(row, str(error), reservation.cost)
            raise error
        except asyncio.CancelledError:
            self.ledger.failed(row, "given up while under way; whether it was charged is unknown", reservation.cost)
            raise
        reservation.cost = self.settings.prices.cost(answer.prompt_tokens, answer.completion_tokens)
        self.ledger.answered(row, answer, reservation.cost)
        return answer

    def _classified(self, error: ServerError) -> Exception:
        """`TransientError`, `Refused` or, if every request has the error, `UserError`."""
        if error.rate_limited:
            return TransientError(error, refusal=error.refusal)
        if error.transient:
            return TransientError(error, charged=error.charged)
        if error.permanent or not error.filtered and not self.ledger.answer_count():
            return UserError(f"{self.transport.server}: {str(error).rstrip('.')}{advice(error, self.settings)}")
        return Refused(REFUSED, str(error))

"""The settings of requests to one model, and the connection that they describe."""

from typing import Any, NamedTuple

import httpx2
import openai

from llava_jax.cli import UserError
from llava_jax.llm_api.cost import Prices, max_prompt_tokens
from llava_jax.llm_api.ledger import Request


class Settings(NamedTuple):
    """How to ask. `body` has all fields of a request besides model and messages, max_tokens among them."""

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
    tries: int = 8  # before a request counts as failed; rate limit errors are not counted
    patience: float = 900.0  # seconds of rate limit errors without any answer before giving up

    @property
    def max_completion_tokens(self) -> int:
        """0 where the requests set no limit."""
        return self.body.get("max_completion_tokens") or self.body.get("max_tokens") or 0

    def check_budget(self) -> None:
        """Raises `UserError` if no budget can be kept, since the requests set no limit."""
        if not self.max_completion_tokens:
            raise UserError("a budget needs max_tokens in the requests: without it no answer has a highest price")

    def max_cost(self, request: Request) -> float:
        """Dollars that the request can cost at most."""
        return self.prices.cost(max_prompt_tokens(request.messages), self.max_completion_tokens)


class Work(NamedTuple):
    """How to ask about tasks.

    Attributes:
      budget: in dollars, None for no limit.
      attempts: answers to a task of which one has to be good.
      batch: whether to use the batch API.
      poll: seconds between looks at batches.
    """

    settings: Settings
    budget: float | None = None
    attempts: int = 3
    batch: bool = False
    poll: float = 60.0


def connect(settings: Settings) -> openai.AsyncOpenAI:
    """The official client, without its retries: the ledger and the rate limit have to see every try."""
    try:
        return openai.AsyncOpenAI(
            base_url=settings.base_url,
            api_key=settings.api_key,
            max_retries=0,
            timeout=settings.timeout,
            http_client=openai.DefaultAioHttpClient(),  # less work a request than httpx
        )
    except (openai.OpenAIError, httpx2.InvalidURL) as error:
        raise UserError(f"{settings.base_url}: {error}") from error

"""What requests cost: tokens of texts without a tokenizer, prices, and a budget that is never exceeded."""

import asyncio
import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from llava_jax.cli import UserError

Message = dict[str, Any]  # role, and content: a text, or a list of parts of type text and image_url

_PIECES = re.compile(r"[A-Za-z]{1,6}|[^A-Za-z\s]")  # English words of up to so many letters are mostly one token
_TOKENS_A_MESSAGE = 4  # of the role and what stands around it
_TOKENS_A_PICTURE, _MOST_TOKENS_A_PICTURE = 1024, 16384


def estimate_tokens(messages: Sequence[Message]) -> int:
    """About how many tokens: a word is one or more, a digit or a sign is one."""
    contents = [_content(message) for message in messages]
    return sum(_text_tokens(text) + pictures * _TOKENS_A_PICTURE + _TOKENS_A_MESSAGE for text, pictures in contents)


def _content(message: Message) -> tuple[str, int]:
    """The text of a message, and how many pictures it has."""
    if isinstance(message["content"], str):
        return message["content"], 0
    texts = [part["text"] for part in message["content"] if part["type"] == "text"]
    return "\n".join(texts), len(message["content"]) - len(texts)


@functools.lru_cache(1024)  # most messages are the same in many prompts
def _text_tokens(text: str) -> int:
    return len(_PIECES.findall(text))


def most_tokens(messages: Sequence[Message]) -> int:
    """As many tokens at most: no tokenizer makes more than one of a byte; a chat template adds up to 64."""
    contents = [_content(message) for message in messages]
    return sum(
        len(text.encode(errors="replace")) + pictures * _MOST_TOKENS_A_PICTURE + 64 for text, pictures in contents
    )


class Prices(NamedTuple):
    """Dollars for a million tokens."""

    prompt: float
    completion: float

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


def check_budget(budget: float | None, prices: Prices) -> None:
    """Raises `UserError` where nothing would ever count as spent."""
    if budget is not None and not any(prices):
        raise UserError(
            "--budget needs --prices IN OUT, the dollars for a million tokens of prompt and of completion, as the "
            "server's price list has them: without, nothing counts as spent"
        )


class BudgetSpent(UserError):
    """The next request might cost more than is left."""


def budget_spent(spent: float, limit: float, needed: float) -> BudgetSpent:
    return BudgetSpent(
        f"${spent:.4f} of the budget of ${limit:.4f} are spent, and the next request may cost ${needed:.4f}: "
        "the same command with a larger budget goes on"
    )


class Budget:
    """Dollars that may be spent, None for any. What a request may cost is reserved before it is sent."""

    def __init__(self, limit: float | None, spent: float = 0.0):
        self.limit, self.spent, self.reserved = limit, spent, 0.0
        self._waiting: list[asyncio.Future[None]] = []

    def reserve(self, dollars: float) -> bool:
        """False where requests under way may leave enough: wait until one is settled. Raises `BudgetSpent`."""
        if self.limit is not None and self.spent + self.reserved + dollars > self.limit:
            if not self.reserved:
                raise budget_spent(self.spent, self.limit, dollars)
            return False
        self.reserved += dollars
        return True

    def settle(self, reserved: float, spent: float) -> None:
        """Of a reservation so much was spent."""
        self.reserved = max(0.0, self.reserved - reserved)
        if self.reserved < 1e-12:  # rounding
            self.reserved = 0.0
        self.spent += spent
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)
        self._waiting.clear()

    def settled(self) -> "asyncio.Future[None]":
        """Done when the next reservation is settled."""
        self._waiting.append(asyncio.get_running_loop().create_future())
        return self._waiting[-1]

"""The budget, which is never exceeded: what a request can cost at most is reserved before the request is sent."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from llava_jax.cli import UserError
from llava_jax.llm_api.cost import Prices
from llava_jax.llm_api.stop import Stop


class BudgetSpent(UserError):
    """The next request can cost more than what is left."""

    def __init__(self, spent: float, limit: float, needed: float):
        super().__init__(
            f"${spent:.4f} of the budget of ${limit:.4f} are spent, and the next request may cost ${needed:.4f}: "
            "the same command with a larger budget resumes"
        )


def check_budget(limit: float | None, prices: Prices) -> None:
    """Raises `UserError` for a limit without prices."""
    if limit is not None and not any(prices):
        raise UserError(
            "--budget needs --prices IN OUT, the dollars for a million tokens of prompt and of completion, as the "
            "server's price list has them: without, nothing counts as spent"
        )


@dataclass
class Reservation:
    """Dollars that are set aside for a request. Its owner sets `cost` to what the request did cost."""

    dollars: float
    cost: float = 0.0


class Budget:
    """Dollars that may be spent; no limit for None."""

    def __init__(self, limit: float | None, spent: float = 0.0):
        self.limit, self.spent, self.reserved = limit, spent, 0.0
        self._settled = asyncio.Event()  # set, and replaced, when a reservation ends

    @contextlib.asynccontextmanager
    async def reserve(self, dollars: float, stop: Stop) -> AsyncIterator[Reservation]:
        """Sets dollars aside. At the end the reservation's cost counts as spent.

        Waits while requests under way may leave enough. Raises `BudgetSpent` when they do not, and `Stopped`.
        """
        while self.limit is not None and self.spent + self.reserved + dollars > self.limit:
            if not self.reserved:
                raise BudgetSpent(self.spent, self.limit, dollars)
            await stop.interrupts(self._settled.wait())
        self.reserved += dollars
        reservation = Reservation(dollars)
        try:
            yield reservation
        finally:
            self.reserved = max(0.0, self.reserved - dollars)
            if self.reserved < 1e-12:  # rounding
                self.reserved = 0.0
            self.spent += reservation.cost
            self._settled.set()
            self._settled = asyncio.Event()

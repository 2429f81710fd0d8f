"""The budget, which is never exceeded: what a request can cost at most is reserved before the request is sent."""

import asyncio

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


class Budget:
    """Dollars that may be spent; no limit for None."""

    def __init__(self, limit: float | None, spent: float = 0.0):
        self.limit, self.spent, self.reserved = limit, spent, 0.0
        self._waiting: list[asyncio.Future[None]] = []

    def reserve(self, dollars: float, stop: Stop) -> "Reservation":
        """Sets dollars aside within `async with`. At its end the reservation's cost counts as spent.

        Waits while requests under way may leave enough. Raises `BudgetSpent` when they do not, and `Stopped`.
        """
        return Reservation(self, dollars, stop)

    def has_room(self, dollars: float) -> bool:
        """Whether so much can be reserved now. Raises `BudgetSpent` if it never can."""
        if self.limit is None or self.spent + self.reserved + dollars <= self.limit:
            return True
        if not self.reserved:
            raise BudgetSpent(self.spent, self.limit, dollars)
        return False

    def settle(self, reservation: "Reservation") -> None:
        """Replaces a reservation by its cost."""
        self.reserved = max(0.0, self.reserved - reservation.dollars)
        if self.reserved < 1e-12:  # rounding
            self.reserved = 0.0
        self.spent += reservation.cost
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)
        self._waiting.clear()

    def settled(self) -> "asyncio.Future[None]":
        """Done when the next reservation is settled."""
        self._waiting.append(asyncio.get_running_loop().create_future())
        return self._waiting[-1]


class Reservation:
    """Dollars that are set aside for a request. Its owner sets `cost` to what the request did cost."""

    def __init__(self, budget: Budget, dollars: float, stop: Stop):
        self.dollars, self.cost = dollars, 0.0
        self._budget, self._stop = budget, stop

    async def __aenter__(self) -> "Reservation":
        while not self._budget.has_room(self.dollars):
            await self._stop.interrupts(self._budget.settled())
        self._budget.reserved += self.dollars
        return self

    async def __aexit__(self, *_: object) -> None:
        self._budget.settle(self)

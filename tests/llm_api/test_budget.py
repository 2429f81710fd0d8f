"""Dollars are reserved before a request, and never more than the budget has."""

import asyncio

import pytest

from llava_jax.llm_api.budget import Budget, BudgetSpent
from llava_jax.llm_api.stop import Stop, Stopped


def test_a_request_waits_until_one_under_way_leaves_enough():
    async def run() -> list[str]:
        budget, stop, order = Budget(1.0), Stop(), []

        async def ask(name: str, cost: float) -> None:
            async with budget.reserve(0.75, stop) as reservation:
                order.append(f"{name} sent")
                await asyncio.sleep(0)
                reservation.cost = cost
                order.append(f"{name} answered")

        await asyncio.gather(ask("a", 0.25), ask("b", 0.5))
        assert (budget.spent, budget.reserved) == (0.75, 0.0)
        with pytest.raises(BudgetSpent, match="0.7500 of the budget of .1.0000 are spent.*may cost .0.7500"):
            await ask("c", 0.5)
        return order

    assert asyncio.run(run()) == ["a sent", "a answered", "b sent", "b answered"]


def test_an_error_frees_the_reservation():
    async def run() -> Budget:
        budget = Budget(1.0)
        with pytest.raises(ValueError):
            async with budget.reserve(1.0, Stop()):
                raise ValueError
        return budget

    budget = asyncio.run(run())
    assert (budget.spent, budget.reserved) == (0.0, 0.0)


def test_a_stop_ends_the_wait():
    async def run() -> None:
        budget, stop = Budget(1.0), Stop()
        async with budget.reserve(1.0, stop):
            waiting = asyncio.create_task(budget.reserve(1.0, stop).__aenter__())
            await asyncio.sleep(0)
            stop.set()
            with pytest.raises(Stopped):
                await waiting

    asyncio.run(run())


def test_no_limit_reserves_anything():
    async def run() -> None:
        async with Budget(None).reserve(1e9, Stop()):
            pass

    asyncio.run(run())

"""The client and its ledger against a scripted server that speaks HTTP."""

import asyncio
import email.utils
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripted_llm import ScriptedLLM

from llava_jax.cli import UserError
from llava_jax.llm_api import client as client_module
from llava_jax.llm_api.client import Client, Settings, Stopped
from llava_jax.llm_api.cost import Budget, BudgetSpent, Prices, most_tokens
from llava_jax.llm_api.ledger import ACCEPTED, Ledger, Request
from llava_jax.llm_api.limits import RateLimit, Refusal

PRICES = Prices(1.0, 2.0)


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "BACKOFF", 0.01)


@pytest.fixture
def ledger(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    yield ledger
    ledger.close()


def request(number: int) -> Request:
    return Request(f"task {number}", 0, [{"role": "user", "content": f"This is the number {number}."}])


def settings(server: ScriptedLLM, **more: Any) -> Settings:
    return Settings("m", {"max_tokens": 100}, server.url, "key", prices=PRICES, **more)


def ask_all(server: ScriptedLLM, ledger: Ledger, count: int, budget: float | None = None, **more: Any) -> list[Any]:
    """The answers, or what was raised instead."""

    async def run() -> list[Any]:
        async with Client(settings(server, **more), ledger, Budget(budget, ledger.totals().cost)) as client:
            return await asyncio.gather(*(client.ask(request(i)) for i in range(count)), return_exceptions=True)

    return asyncio.run(run())


def states(ledger: Ledger) -> dict[str, int]:
    return dict(ledger.db.execute("SELECT state, COUNT(*) FROM requests GROUP BY state"))


def check_answers(answers: list[Any]) -> None:
    assert [getattr(answer, "text", answer) for answer in answers] == [
        f"You said: This is the number {i}." for i in range(len(answers))
    ]


def test_answers_in_the_ledger_are_not_asked_for_again(tmp_path: Path):
    path = tmp_path / "ledger.sqlite"
    with ScriptedLLM() as server:
        ledger = Ledger(path)
        first = ask_all(server, ledger, 5)
        ledger.begin(request(5), 0.25)  # as if the process died with it under way
        ledger.close()
        ledger = Ledger(path)
        assert states(ledger) == {"answered": 5, "lost": 1}
        assert ledger.totals().cost > 0.25  # counted as paid
        second = ask_all(server, ledger, 8)
    check_answers(second)
    assert second[:5] == first and server.completions == 8
    assert states(ledger) == {"answered": 8, "lost": 1}
    with pytest.raises(UserError, match="another prompt"):
        ledger.answer(Request("task 1", 0, [{"role": "user", "content": "Something else"}]))
    ledger.close()


def test_what_is_no_ledger_is_one_line(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "ledger.sqlite").write_text("This is no database, but a text that is longer than its header.")
    (tmp_path / "b" / "ledger.sqlite").mkdir(parents=True)
    for folder in ("a", "b", "a"):  # whose lock is given back
        with pytest.raises(UserError, match=f"{folder}/ledger.sqlite: is no ledger"):
            Ledger(tmp_path / folder / "ledger.sqlite")


def test_one_process_and_one_result_a_task(tmp_path: Path, ledger: Ledger):
    with pytest.raises(UserError, match="another process"):
        Ledger(tmp_path / "ledger.sqlite")
    ledger.conclude("a", ACCEPTED, {"score": 7}, [ACCEPTED])
    with pytest.raises(Exception, match="UNIQUE"):
        ledger.conclude("a", "empty", None, [])
    assert ledger.verdicts() == {ACCEPTED: 1}
    ledger.identify({"seed": 1})
    with pytest.raises(UserError, match="seed: 1 there, 2 now"):
        ledger.identify({"seed": 2})


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after": "7", "retry-after-ms": "250"}, 0.25),
        ({"retry-after": "-3"}, 0),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "inf"}, None),
        ({}, None),
    ],
)
def test_forms_of_retry_after(headers: dict[str, str], seconds: float | None):
    assert client_module.retry_after(headers) == seconds


def test_a_date_in_retry_after_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    date = email.utils.formatdate(1_000_090, usegmt=True)
    monkeypatch.setattr(client_module, "time", SimpleNamespace(time=lambda: 1_000_000.0))
    assert client_module.retry_after({"retry-after": date}) == 90


def test_retry_after_is_honoured(ledger: Ledger):
    with ScriptedLLM(refusals=1, retry_after=0.6) as server:
        check_answers(ask_all(server, ledger, 1))
    first, second = server.times
    assert second - first >= 0.6
    assert states(ledger) == {"answered": 1, "failed": 1}


@pytest.mark.parametrize("stream", [False, True])
def test_faults_are_retried(ledger: Ledger, stream: bool):
    faults = {"error": 0.15, "overload": 0.05, "cut": 0.15, "malformed": 0.1, "empty": 0.1, "slow": 0.05}
    with ScriptedLLM(faults=faults) as server:
        check_answers(ask_all(server, ledger, 40, stream=stream, concurrency=8, tries=30, timeout=0.5))
    assert states(ledger)["answered"] == 40 and states(ledger)["failed"] > 5


@pytest.mark.parametrize("fault", ["no_usage", "wrong_usage"])
def test_impossible_usage_is_estimated(ledger: Ledger, fault: str):
    with ScriptedLLM(faults={fault: 1.0}) as server:
        (answer,) = ask_all(server, ledger, 1)
    assert answer.usage == "estimated" and answer.prompt_tokens > 0 and 0 < answer.completion_tokens <= 100


def test_what_a_server_may_have_charged_counts_as_spent(ledger: Ledger):
    with ScriptedLLM(faults={"dropped": 1.0}) as server:
        (answer,) = ask_all(server, ledger, 1, tries=2)
        assert isinstance(answer, UserError) and "ServerDisconnectedError" in str(answer)
    worst = PRICES.cost(most_tokens(request(0).messages), 100)
    assert server.completions == 2 and ledger.totals().cost == pytest.approx(2 * worst)


def test_budget_is_not_exceeded(ledger: Ledger):
    budget = 0.002  # a request is 20 to 30 tokens there and back, and 300 reserved
    with ScriptedLLM(latency=0.01) as server:
        answers = ask_all(server, ledger, 200, budget)
    spent = [isinstance(answer, BudgetSpent) for answer in answers]
    assert any(spent) and not all(spent)
    assert server.completions == states(ledger)["answered"] == spent.count(False)
    assert budget - 0.0004 < ledger.totals().cost <= budget


def test_budget_holds_where_answers_are_lost_on_the_way(ledger: Ledger):
    budget = 0.02
    with ScriptedLLM(latency=0.01, faults={"dropped": 0.2, "cut": 0.2, "malformed": 0.1, "error": 0.1}) as server:
        answers = ask_all(server, ledger, 200, budget, concurrency=8, tries=100)
    assert any(isinstance(answer, BudgetSpent) for answer in answers)
    answered = states(ledger)["answered"]
    of_one = ledger.db.execute("SELECT AVG(cost) FROM requests WHERE state = 'answered'").fetchone()[0]
    assert server.completions > answered  # charged by the server, and not there
    assert server.completions * of_one < ledger.totals().cost <= budget


def test_budget_needs_a_longest_answer(ledger: Ledger):
    with pytest.raises(UserError, match="max_tokens"):
        Client(Settings("m", {}, "http://127.0.0.1:9/v1", "key"), ledger, Budget(1.0))


def test_stop_drains(ledger: Ledger):
    async def run(server: ScriptedLLM) -> list[Any]:
        async with Client(settings(server, concurrency=4), ledger, Budget(None)) as client:
            tasks = [asyncio.create_task(client.ask(request(i))) for i in range(20)]
            while len(server.times) < 4:
                await asyncio.sleep(0.01)
            client.stop.set()
            held.clear()
            return await asyncio.gather(*tasks, return_exceptions=True)

    held = threading.Event()
    held.set()
    with ScriptedLLM(held=held) as server:
        answers = asyncio.run(run(server))
    check_answers(answers[:4])
    assert all(isinstance(answer, Stopped) for answer in answers[4:])
    assert states(ledger) == {"answered": 4} and server.completions == 4


def test_nobody_there_is_one_line(ledger: Ledger):
    with ScriptedLLM() as server:
        pass
    (error,) = ask_all(server, ledger, 1, tries=2)
    assert isinstance(error, UserError) and "\n" not in str(error)
    assert ledger.totals().cost == 0


def test_known_and_learned_rates():
    known, sent = RateLimit(requests=120), []
    for tick in range(600, 1800):  # after a minute of rest
        sent += [tick] * (known.wait(tick / 10, 1.0) <= 0)
    assert 238 <= len(sent) <= 242
    refused = RateLimit()
    assert refused.wait(0.0, 1.0) == 0
    refused.refuse(0.0, Refusal(5.0), 1.0)
    assert refused.wait(1.0, 1.0) == 4.0


def test_tokens_have_a_rate_of_their_own():
    known, sent = RateLimit(tokens=6000), 0
    for tick in range(600, 1800):
        sent += known.wait(tick / 10, 50.0) <= 0
    assert 238 <= sent <= 242
    refused = RateLimit()
    assert all(refused.wait(0.0, 100.0) == 0 for _ in range(10))
    refused.refuse(1.0, Refusal(9.0, of_tokens=True), 100.0)
    assert refused.tokens.rate == pytest.approx(900 / 10) and refused.requests.rate == float("inf")

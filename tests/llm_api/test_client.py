"""The client and its ledger against a scripted server that speaks HTTP."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from scripted_llm import ScriptedLLM

from llava_jax.cli import UserError
from llava_jax.llm_api import asking, batches, retry
from llava_jax.llm_api.asking import Outcome, Task, Work
from llava_jax.llm_api.budget import Budget, BudgetSpent
from llava_jax.llm_api.client import Client
from llava_jax.llm_api.cost import Prices, max_prompt_tokens
from llava_jax.llm_api.errors import Refused
from llava_jax.llm_api.ledger import ACCEPTED, Ledger, Request
from llava_jax.llm_api.replies import read_completion
from llava_jax.llm_api.settings import Settings
from llava_jax.llm_api.stop import Stopped

PRICES = Prices(1.0, 2.0)


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "BACKOFF", 0.01)


@pytest.fixture
def ledger(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    yield ledger
    ledger.close()


def request(number: int) -> Request:
    return Request(f"task {number}", 0, [{"role": "user", "content": f"This is the number {number}."}])


def settings(server: ScriptedLLM, **more: Any) -> Settings:
    return Settings("m", {"max_tokens": 100}, **{"base_url": server.url} | more, api_key="key", prices=PRICES)


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
    worst = PRICES.cost(max_prompt_tokens(request(0).messages), 100)
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


# ------------------------------------------------------------------------------------------------- what is no answer


def completion(content: Any, finish_reason: str = "stop", **message: Any) -> dict[str, Any]:
    choice = {
        "index": 0,
        "finish_reason": finish_reason,
        "message": {"role": "assistant", "content": content} | message,
    }
    return {"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 3}}


def event(**choice: Any) -> dict[str, Any]:
    return {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {}, "finish_reason": None} | choice]}


RATE = {"message": "Provider returned error", "code": 429, "metadata": {"raw": "Too Many Requests"}}
IN_STREAM = [event(delta={"content": "No"}), {"choices": [], "error": RATE}]
IN_CHOICE = completion("No") | {"choices": [{"finish_reason": "error", "message": {"content": "N"}, "error": RATE}]}


WHOLE = [
    {"id": None, "choices": None, "error": RATE},
    {"error": {"message": "Slow down", "code": "rate_limit_exceeded"}},
    {"error": "Rate limit exceeded: 20 requests per minute"},
    {"object": "error", "message": "Too many requests", "code": "429"},
    {"detail": "Too Many Requests"},
    b'[{"error": {"code": 429, "message": "Quota exceeded", "status": "RESOURCE_EXHAUSTED"}}]',  # of Google
    IN_CHOICE,
    {"error": "Provider unavailable", "code": 429},
    {"error": True, "message": "Slow down", "statusCode": "429"},
    {"error": {"message": {"message": "Slow down", "code": 429.0}}},
    {"errors": [{"message": "upstream returned 429"}]},
    {"error": {"message": "try later", "code": "Throttling.RateQuota"}},
    {"choices": None, "base_resp": {"status_code": 1002, "status_msg": "rate limit"}},  # of MiniMax
    {"error_code": 18, "error_msg": "Open api qps request limit reached"},  # of Baidu
]
EVENTS = [
    [event(delta={"content": "N"}), {"object": "error", "message": "Too many requests", "code": 429}],
    [{"detail": "Too Many Requests"}],
    [{"error": "overloaded"}],
    IN_STREAM,
    [event(finish_reason="error", error=RATE)],
]


@pytest.mark.parametrize(
    ("body", "stream"),
    [*((body, stream) for body in WHOLE for stream in (False, True)), *((body, True) for body in EVENTS)],
)
def test_a_refusal_for_the_rate_within_an_answer_waits_and_costs_nothing(ledger: Ledger, body: Any, stream: bool):
    """It may come more often than a request is tried."""
    left = [body] * 4
    with ScriptedLLM(raw=lambda _: left.pop() if left else None) as server:
        check_answers(ask_all(server, ledger, 1, stream=stream, tries=2))
        assert len(server.times) == 5 and server.completions == 1
    assert states(ledger) == {"answered": 1, "failed": 4}
    assert ledger.db.execute("SELECT TOTAL(cost) FROM requests WHERE state = 'failed'").fetchone() == (0.0,)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": {"message": "no such key", "code": 401}}, "status 401: no such key"),
        ({"error": {"message": "more credits", "code": 402}}, "status 402: more credits"),
        ({"error": {"message": "spent", "code": "insufficient_quota"}}, "status 429: spent"),
        ({"error": {"message": "Provider returned error", "code": 502}}, "no answer .status 502: Provider"),
        (completion(None, "error"), "the server gave up the answer"),
        (b"<!doctype html><title>Open WebUI</title>", "an HTML page, no answer; is the path of the URL right"),
        ({"choices": []}, "is no chat completion"),
        ({"error": {"message": "too long", "type": "invalid_request_error", "code": None}}, "status 400: too long"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_within_an_answer_is_that_error(ledger: Ledger, body: Any, message: str, stream: bool):
    with ScriptedLLM(raw=lambda _: body) as server:
        (error,) = ask_all(server, ledger, 1, stream=stream, tries=2)
    assert isinstance(error, UserError) and message.replace(".", "") in str(error).replace("(", "").replace(".", "")
    assert states(ledger) == {"failed": len(server.times)}


@pytest.mark.parametrize(
    "events", [["hello"], [5], [{"choices": [None]}], [{"choices": 5}], [event(delta={"content": 5})]]
)
def test_a_stream_of_something_else_is_one_line(ledger: Ledger, events: list[Any]):
    with ScriptedLLM(raw=lambda _: events) as server:
        (error,) = ask_all(server, ledger, 1, stream=True, tries=2)
    assert isinstance(error, UserError) and "no chunk of an answer" in str(error)


@pytest.mark.parametrize(
    "error",
    [
        {"message": "Your input was flagged", "code": 403, "metadata": {"reasons": ["violence"]}},
        {"message": "The response was filtered", "code": "content_filter"},
        {"message": "Output data may contain inappropriate content.", "code": "data_inspection_failed"},
    ],
)
def test_a_prompt_that_a_filter_stops_is_refused_alone(ledger: Ledger, error: dict[str, Any]):
    body = {"error": error}
    with ScriptedLLM(raw=lambda asked: body if "number 1." in asked["messages"][0]["content"] else None) as server:
        answers = ask_all(server, ledger, 3)
    assert isinstance(answers[1], Refused) and [answers[i].text for i in (0, 2)] == [
        f"You said: This is the number {i}." for i in (0, 2)
    ]


THINKING = "<think>\nIs it? I do not know.\n</think>\n\n"


@pytest.mark.parametrize(
    ("body", "text", "finish_reason", "kept"),
    [
        (completion(THINKING + "No"), "No", "stop", THINKING + "No"),
        (completion("<think>\nIs it"), None, "length", "<think>\nIs it"),
        (completion("Is it", "length"), "Is it", "length", "Is it"),
        (completion(None, reasoning_content="It is no."), None, "stop", None),
        (completion(None, "length", reasoning_content="It is"), None, "length", None),
        (completion(""), "", "stop", ""),
        (completion(None, refusal="I can't."), "I can't.", "content_filter", "I can't."),
        (completion(None, "content_filter"), None, "content_filter", None),
        (completion(None, "content_filter: SAFETY"), None, "content_filter", None),
        (completion(None, "PROHIBITED_CONTENT"), None, "content_filter", None),
        (completion(["N", {"text": "o"}]), "No", "stop", "No"),
        ([event(delta={"content": [{"type": "text", "text": "No"}]}, finish_reason="stop")], "No", "stop", "No"),
        (completion([{"type": "thinking", "thinking": []}, {"type": "text", "text": "No"}]), "No", "stop", "No"),
        (completion("half \ud83d"), "half ?", "stop", "half ?"),
        ([event(delta={"content": "<think>a</th"}), event(delta={"content": "ink>No"}, finish_reason="stop")], "No",
         "stop", "<think>a</think>No"),
        ([event(delta={"reasoning_content": "No?"}), event(finish_reason="length")], None, "length", None),
    ],
)  # fmt: skip
def test_an_answer_is_what_follows_the_thinking(ledger: Ledger, body: Any, text: str | None, finish_reason: str, kept):
    """The ledger keeps it as it came, and what comes from there is the same."""
    with ScriptedLLM(raw=lambda _: body) as server:
        (answer,) = ask_all(server, ledger, 1, stream=isinstance(body, list))
        assert (answer.text, answer.finish_reason) == (text, finish_reason)
        assert ask_all(server, ledger, 1) == [answer] and len(server.times) == 1
    assert ledger.db.execute("SELECT answer FROM requests").fetchall() == [(kept,)]


@pytest.mark.parametrize(
    ("body", "error", "option"),
    [
        ({"max_tokens": 9, "temperature": 0.0},
         {"message": "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."},
         """add --body '{"max_tokens": null, "max_completion_tokens": 9}'"""),
        ({"max_tokens": 9, "temperature": 0.0}, {"message": "Unsupported value", "param": "temperature"},
         """add --body '{"temperature": null}'"""),
        ({"max_tokens": 9}, {"message": "max_tokens is too large: 9. This model's context has 8."}, "smaller --max"),
        ({"max_tokens": 9}, {"message": "the picture is none"}, "the picture is none"),
        ({"max_tokens": 9}, {"message": "This model's maximum context length is 8 tokens. However, you requested 9."},
         ": give a smaller --max-tokens"),
        ({"max_tokens": 9}, {"message": "Could not finish the message because max_tokens or model output limit was "
          "reached. Please try again with higher max_tokens."}, ": give a larger --max-tokens"),
        ({"max_completion_tokens": 9}, {"message": "Invalid 'max_output_tokens': integer below minimum value."},
         ": give a larger max_completion_tokens in --body"),
        ({"max_completion_tokens": 9}, {"message": "Unrecognized request argument supplied: max_completion_tokens"},
         """add --body '{"max_completion_tokens": null, "max_tokens": 9}'"""),
        ({"temperature": 0.7, "top_p": 1.0}, {"message": "`temperature` and `top_p` cannot both be specified"},
         """add --body '{"top_p": null}'"""),
        ({"max_tokens": 9}, {"message": "'messages[0].role' does not support 'system' with this model."},
         ": the model takes no system prompt, as this command sends"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("within", [False, True])
def test_a_refused_parameter_is_named_with_the_option_that_mends_it(
    tmp_path: Path, body: dict[str, Any], error: dict[str, Any], option: str, within: bool
):
    """After which the same ledger takes other parameters, as nothing was answered."""
    with ScriptedLLM() as server:
        if within:
            server.script.raw = lambda _: {"error": error | {"code": 400}}
        else:
            server.script.refusal = {"error": error}
        task = Task("a", lambda: [{"role": "user", "content": "A?"}], str.strip)
        work = Work(Settings("m", body, server.url, "key"))
        with pytest.raises(UserError, match="status 400") as caught:
            ask_in(tmp_path, work, task)
        assert str(caught.value).endswith(option) or option in str(caught.value)
        server.script.raw, server.script.refusal = (lambda _: None), None
        other = work._replace(settings=work.settings._replace(body={"max_tokens": 7}))
        assert ask_in(tmp_path, other, task)[0].value == "You said: A?"
        with pytest.raises(UserError, match="made for other work .body"):
            ask_in(tmp_path, work, task)


@pytest.mark.parametrize("path", ["", "/", "/v1/chat/completions"])
def test_an_address_without_its_path_is_told(ledger: Ledger, path: str):
    with ScriptedLLM() as server:
        (error,) = ask_all(server, ledger, 1, base_url=server.url.removesuffix("/v1") + path)
    assert isinstance(error, UserError) and "status 404" in str(error) and "It ends with /v1" in str(error)


@pytest.mark.parametrize("address", ["http://[", "http://host:port/v1", "http://", "https:///v1"])
def test_an_address_that_is_none_is_one_line(tmp_path: Path, address: str):
    task = Task("A", lambda: [{"role": "user", "content": "A?"}], str.strip)
    with pytest.raises(UserError, match="^http.*") as error:
        ask_in(tmp_path, Work(Settings("m", {"max_tokens": 9}, address, "key", tries=1)), task)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("usage", "finish_reason", "booked"),
    [
        ({"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}, "stop", 3),
        ({"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 52}, "stop", 43),  # Gemini
        ({"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 52,
          "completion_tokens_details": {"reasoning_tokens": 40}}, "stop", 43),  # xAI
        ({"prompt_tokens": 9, "completion_tokens": 43, "total_tokens": 52,
          "completion_tokens_details": {"reasoning_tokens": 40}}, "stop", 43),  # OpenAI
        ({"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": "many"}, "stop", 3),
        (None, "stop", 6),  # an estimate
        (None, "length", 50),
    ],
)  # fmt: skip
def test_thinking_is_booked_wherever_it_is_counted(usage: Any, finish_reason: str, booked: int):
    body = completion("Yes.", finish_reason) | {"usage": usage}
    assert read_completion(body, [{"role": "user", "content": "Is it?"}], 50).completion_tokens == booked


def ask_in(directory: Path, work: Work, *tasks: Task) -> list[Outcome]:
    return asking.ask_all(work, tasks, directory, {}, "asking")


@pytest.mark.parametrize(
    ("body", "said"),
    [({"max_tokens": 9}, "answers of up to 9: up to about $36.00"),
     ({}, "about $0.00, and answers without a limit: set max_tokens to know their cost")],
)  # fmt: skip
def test_a_forecast_knows_no_cost_without_a_limit(body: dict[str, Any], said: str):
    task = Task("A", lambda: [{"role": "user", "content": "A?"}], str.strip)
    settings = Settings("m", body, prices=Prices(0.0, 4_000_000.0))
    assert asking.forecast(Work(settings), [task]).endswith(said)


@pytest.mark.parametrize("batch", [False, True])
def test_a_budget_needs_a_limit_of_each_answer(tmp_path: Path, batch: bool):
    task = Task("A", lambda: [{"role": "user", "content": "A?"}], str.strip)
    with ScriptedLLM() as server:
        settings = Settings("m", {}, server.url, "key", prices=Prices(1.0, 4.0))
        with pytest.raises(UserError, match="a budget needs max_tokens"):
            ask_in(tmp_path, Work(settings, budget=5.0, batch=batch), task)
        assert not server.times


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize(
    ("body", "reason", "asked", "open_"),
    [
        (completion(None), "empty", 3, False),
        (completion(" "), "empty", 3, False),
        (completion("<think>\nIs it", "length"), "cut off at --max-tokens", 1, False),
        (completion("Is it a", "length"), "cut off at --max-tokens", 1, False),
        (completion("<think>ok</think>Is it a", "length"), "cut off at --max-tokens", 1, False),
        (completion(None, "content_filter"), "stopped by a filter", 3, False),
        (completion(None, refusal="I can't."), "stopped by a filter: I can't.", 3, False),
        ({"error": {"message": "not this one", "code": 400}}, "refused-by-server: status 400: not this one", 1, False),
        ({"error": {"message": "broken", "code": 500}}, "server-error: ", 8, True),
    ],
)
def test_why_there_is_no_answer(tmp_path: Path, body: Any, reason: str, asked: int, open_: bool, batch: bool):
    """A value is never made of it, though another task is answered; and where the server fails it stays open."""

    def raw(request: dict[str, Any]) -> Any:
        return body if request["messages"][0]["content"] == "A?" else None

    tasks = [Task(name, lambda name=name: [{"role": "user", "content": f"{name}?"}], str.strip) for name in "BA"]
    with ScriptedLLM(raw=raw) as server:
        settings = Settings("m", {"max_tokens": 9}, server.url, "key", concurrency=1)
        work = Work(settings, batch=batch, poll=0.01)
        other, none = ask_in(tmp_path, work, *tasks)
        assert other.value == "You said: B?" and none.value is None
        assert none.reason.startswith(reason) and none.open == open_
        if not batch:
            assert len(server.times) == 1 + asked
        server.script.raw = lambda _: None
        again = ask_in(tmp_path, work, *tasks)[1]
        assert (again.value == "You said: A?") == (open_ or reason.startswith("refused"))  # what was answered stays


def test_what_completed_batches_leave_out_is_given_up(tmp_path: Path):
    tasks = [Task(name, lambda name=name: [{"role": "user", "content": f"{name}?"}], str.strip) for name in "BA"]
    with ScriptedLLM() as server:
        server.batches.omits = lambda body: body["messages"][0]["content"] == "A?"
        work = Work(Settings("m", {"max_tokens": 9}, server.url, "key", concurrency=1), batch=True, poll=0.01)
        other, none = ask_in(tmp_path, work, *tasks)
        assert other.value == "You said: B?" and none.reason.startswith("server-error: ") and none.open
        assert len(server.batches.batches) == batches.TRIES


def test_what_is_refused_for_the_rate_in_a_batch_stays_open(tmp_path: Path):
    task = Task("A", lambda: [{"role": "user", "content": "A?"}], str.strip)
    with ScriptedLLM(raw=lambda _: {"error": RATE}) as server:
        work = Work(Settings("m", {"max_tokens": 9}, server.url, "key", prices=PRICES), batch=True, poll=0.01)
        with pytest.raises(UserError, match="status 429: Provider returned error .Too Many Requests.*resumes"):
            ask_in(tmp_path, work, task)
        server.script.raw = lambda _: None
        assert ask_in(tmp_path, work, task)[0].value == "You said: A?"
    ledger = Ledger(tmp_path / "ledger.sqlite")
    assert states(ledger) == {"unsent": 1, "answered": 1} and ledger.totals().cost < 1e-3
    ledger.close()

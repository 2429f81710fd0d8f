"""What stands before the app: limits of size, time and number, and the key."""

import asyncio
import json

import pytest

from llava_jax.serve import gate
from llava_jax.serve.gate import Body, Gate, Traffic, same_secret


def call(
    app, messages=(), path="/v1/chat/completions", headers=(), traffic=None, closed=None, key=None, query=b""
) -> tuple:
    """-> (status, error) that the gate answers with, or what `app` sent."""
    sent, waiting = [], list(messages)

    async def receive():
        if not waiting:
            await asyncio.Event().wait()
        return waiting.pop(0)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": path, "headers": list(headers), "method": "POST", "query_string": query}
    traffic = traffic or Traffic(limit=2, bytes_limit=30)
    before = traffic.active, traffic.body_bytes
    asyncio.run(Gate(app, traffic, lambda: closed, key, max_body_bytes=10)(scope, receive, send))
    assert (traffic.active, traffic.body_bytes) == before
    body = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], json.loads(body or b"null")


def part(size: int, more: bool = True) -> dict:
    return {"type": "http.request", "body": b" " * size, "more_body": more}


async def reads(scope, receive, send) -> None:
    """Reads its body and answers null."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"null"})


def test_what_fits_passes():
    assert call(reads, [part(5), part(5, more=False)]) == (200, None)


@pytest.mark.parametrize("headers, messages", [([(b"content-length", b"11")], []), ([], [part(6), part(6)])])
def test_a_body_that_is_too_large(headers, messages):
    status, body = call(reads, messages, headers=headers)
    assert (status, body["error"]["type"]) == (413, "invalid_request_error")


@pytest.mark.parametrize("deadline", ["BODY_SECONDS", "READ_SECONDS"])
def test_a_body_that_never_comes(monkeypatch, deadline):
    monkeypatch.setattr(gate, deadline, 0.05)
    assert call(reads, [part(5)])[0] == 408


@pytest.mark.parametrize("rate, status", [(1, 200), (1000, 408)])
def test_a_body_that_keeps_coming_may_take_longer(monkeypatch, rate, status):
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.3)
    monkeypatch.setattr(gate, "BODY_BYTES_PER_SECOND", rate)
    parts = [part(1)] * 6 + [part(1, more=False)]

    async def slow(scope, receive, send):
        async def next_part():
            await asyncio.sleep(0.1)
            return parts.pop(0)

        await Gate(reads, Traffic(limit=2, bytes_limit=30), lambda: None, None, 10)(scope, next_part, send)

    assert call(slow, path="/")[0] == status


def test_a_silent_body_makes_room_for_others(monkeypatch):
    """Where there is no room for all bodies, the one that is silent for longest is given up."""
    monkeypatch.setattr(gate, "SILENT_SECONDS", 0.0)
    traffic = Traffic(limit=2, bytes_limit=12)
    statuses = {}

    async def request(name: str, messages: list[dict], started: asyncio.Event, then: asyncio.Event) -> None:
        async def receive():
            if messages:
                return messages.pop(0)
            started.set()
            await then.wait()
            return part(0, more=False)

        async def send(message):
            if "status" in message:
                statuses[name] = message["status"]

        scope = {"type": "http", "path": "/v1/chat/completions", "headers": [], "method": "POST"}
        await Gate(reads, traffic, lambda: None, None, max_body_bytes=10)(scope, receive, send)

    async def both() -> None:
        started, never = asyncio.Event(), asyncio.Event()
        silent = asyncio.create_task(request("silent", [part(8)], started, never))
        await started.wait()
        await request("other", [part(8, more=False)], asyncio.Event(), never)
        await silent

    asyncio.run(both())
    assert statuses == {"silent": 408, "other": 200}
    assert (traffic.body_bytes, traffic.active, traffic.reading) == (0, 0, set())


def test_bodies_that_are_on_their_way_hold_no_place():
    traffic = Traffic(limit=1, bytes_limit=30, reading={Body(), Body(), Body()})
    assert call(reads, [part(5, more=False)], traffic=traffic) == (200, None)


def test_the_bytes_of_a_body_are_free_once_it_is_released():
    traffic, seen = Traffic(limit=1, bytes_limit=30), []

    async def app(scope, receive, send):
        while (await receive()).get("more_body"):
            pass
        seen.append(traffic.body_bytes)
        scope["release_body"]()
        seen.append(traffic.body_bytes)
        await reads(scope, receive, send)

    async def one_message_more(scope, receive, send):
        await app(scope, receive, send)

    call(one_message_more, [part(5), part(5, more=False), part(0, more=False)], traffic=traffic)
    assert seen == [10, 0]


def test_large_answers_are_written_in_parts():
    sizes = []

    async def app(scope, receive, send):
        for size in (0, 1, gate.WRITE_BYTES, gate.WRITE_BYTES + 1, 3 * gate.WRITE_BYTES):
            await send({"type": "http.response.body", "body": bytes(size), "more_body": size < gate.WRITE_BYTES})

    async def send(message):
        sizes.append((len(message["body"]), message["more_body"]))

    scope = {"type": "http", "path": "/", "headers": [], "method": "GET"}
    gated = Gate(app, Traffic(limit=1, bytes_limit=1), lambda: None, None, max_body_bytes=1)
    asyncio.run(gated(scope, None, send))
    whole = gate.WRITE_BYTES
    assert sizes == [
        *((0, True), (1, True), (whole, False), (whole, True), (1, False)),
        *((whole, True), (whole, True), (whole, False)),
    ]


@pytest.mark.parametrize(
    "options, status",
    [
        ({"query": b"a" * 8193}, 414),
        ({"headers": [(b"x", b"")] * 101}, 431),
        ({"headers": [(b"x", b"a" * (16 << 10))]}, 431),
        ({"headers": [(b"content-length", b"1"), (b"transfer-encoding", b"chunked")]}, 400),
        ({"path": "http://evil.test/v1/models"}, 400),
        ({"path": "*"}, 400),
    ],
)
def test_heads_that_no_client_has_a_reason_to_send(options, status):
    assert call(reads, [part(0, more=False)], **options)[0] == status


def test_too_many_at_a_time():
    for traffic in (Traffic(limit=2, bytes_limit=30, active=2), Traffic(limit=2, bytes_limit=30, body_bytes=25)):
        status, body = call(reads, [part(10, more=False)], traffic=traffic)
        assert (status, body["error"]["code"]) == (429, "queue_full")


def test_only_work_is_refused_while_closed():
    assert call(reads, [part(0, more=False)], closed="not now")[0] == 503
    assert call(reads, [part(0, more=False)], closed="not now", path="/v1/models")[0] == 200


def test_secrets_compare():
    assert same_secret("key", "key")
    assert not same_secret("keY", "key")
    assert not same_secret("\udcff", "key")
    assert not same_secret("", "key")

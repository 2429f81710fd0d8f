"""What stands before the app: limits of size, time and number, and the key."""

import asyncio
import json

import pytest

from llava_jax.serve import gate
from llava_jax.serve.gate import Gate, Traffic, same_secret


def call(app, messages=(), path="/v1/chat/completions", headers=(), traffic=None, closed=None, key=None) -> tuple:
    """-> (status, error) that the gate answers with, or what `app` sent."""
    sent, waiting = [], list(messages)

    async def receive():
        if not waiting:
            await asyncio.Event().wait()
        return waiting.pop(0)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": path, "headers": list(headers), "method": "POST"}
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


def test_a_body_that_never_comes(monkeypatch):
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.05)
    assert call(reads, [part(5)])[0] == 408


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

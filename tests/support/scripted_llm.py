"""A scripted OpenAI-compatible server for chat completions, with the faults that real ones have.

In a test: `with ScriptedLLM(latency=0.2, faults={"error": 0.1}) as server: server.url`.
"""

import asyncio
import collections
import json
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from scripted_batches import ScriptedBatches


def echo(body: dict[str, Any]) -> str:
    return f"You said: {body['messages'][-1]['content']}"


@dataclass
class Script:
    """What the server does: how it answers, and how often each fault strikes."""

    reply: Callable[[dict[str, Any]], Any] = echo  # the message's content
    latency: float = 0.0  # seconds
    held: threading.Event | None = None  # while it is set, nothing is answered
    faults: dict[str, float] = field(default_factory=dict)  # probability of each of FAULTS
    refusals: int = 0  # of the first requests, with 429
    requests_a_minute: float = 0  # what is more is refused, if not 0
    window: str = "bucket"  # how they are counted: bucket, fixed (each minute), sliding (the last 60 s)
    retry_after: float = 0.5  # seconds, of these
    finish_reason: str = "stop"
    raw: Callable[[dict[str, Any]], Any] = lambda body: None  # JSON or bytes instead of a completion; a list are events
    refusal: Any = None  # the JSON of a 400 to every request
    seed: int = 0


class Rate:
    """What a server takes in a minute, counted in one of the ways that servers count."""

    def __init__(self, requests_a_minute: float, window: str):
        self.most, self.window = requests_a_minute, window
        self.taken: collections.deque[float] = collections.deque()
        self.level, self.filled, self.begin = 1.0, time.monotonic(), 0.0

    def refuse(self) -> float:
        """Seconds after which to come again, 0 if a request is taken now."""
        now = time.monotonic()
        if self.window == "bucket":  # with room for a second's worth
            rate = self.most / 60
            self.level = min(max(rate, 1.0), self.level + (now - self.filled) * rate)
            self.filled = now
            if self.level < 1:
                return (1 - self.level) / rate
            self.level -= 1
            return 0.0
        if self.window == "fixed":  # minutes from the first request on
            self.begin = self.begin or now
            if now - self.begin >= 60:
                self.begin += 60 * ((now - self.begin) // 60)
                self.taken.clear()
            again = self.begin + 60 - now
        else:
            while self.taken and self.taken[0] <= now - 60:
                self.taken.popleft()
            again = self.taken[0] + 60 - now if self.taken else 0.0
        if len(self.taken) >= self.most:
            return again
        self.taken.append(now)
        return 0.0


FAULTS = ("error", "overload", "cut", "dropped", "malformed", "empty", "slow", "no_usage", "wrong_usage", "refused")
SLOW = 1.0  # seconds that a slow answer takes longer


class ScriptedLLM:
    """The server, in a thread of its own. `completions` counts the answers that a real one would have charged."""

    def __init__(self, **script: Any):
        self.script = Script(**script)
        self.random = random.Random(self.script.seed)
        self.completions = 0
        self.times: list[float] = []  # of all requests, on the monotonic clock
        self.asked: list[tuple[str, float]] = []  # idempotency key of each chat, and when, in seconds since 1970
        self.port = 0
        self.rate = Rate(self.script.requests_a_minute, self.script.window)
        self.batches = ScriptedBatches(self._batched)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> "ScriptedLLM":
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(ready)), daemon=True)
        self._thread.start()
        ready.wait()
        return self

    def __exit__(self, *_: Any) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _run(self, ready: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await self.listen()
        ready.set()
        await self._stop.wait()
        server.close()

    async def listen(self) -> asyncio.Server:
        server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=1 << 24)
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._one_request(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _one_request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        method, path, _ = first.split(" ")
        self.times.append(time.monotonic())
        if path == "/v1/chat/completions":
            self.asked.append((headers.get("idempotency-key", ""), time.time()))
            return await self._chat(json.loads(body), writer)
        status, content = self.batches.handle(method, path, body) or (404, error(f"no {method} {path}"))
        self._send(writer, status, content)
        return True

    def _send(
        self, writer: asyncio.StreamWriter, status: int, content: Any, headers: dict[str, Any] | None = None
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        fields = {"Content-Type": "application/json", "Content-Length": len(data), **(headers or {})}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        writer.write(f"HTTP/1.1 {status} X\r\n{head}\r\n".encode() + data)

    # ------------------------------------------------------------------------------------------- chat completions

    async def _chat(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        if len(self.times) <= self.script.refusals:
            self._send(writer, 429, error("rate limit reached"), {"Retry-After": self.script.retry_after})
            return True
        if self.script.requests_a_minute and (again := self.rate.refuse()):
            self._send(writer, 429, error("rate limit reached"), {"Retry-After": f"{again:.3f}"})
            return True
        fault = self._fault()
        await asyncio.sleep(self.script.latency + (SLOW if fault == "slow" else 0))
        while self.script.held and self.script.held.is_set():
            await asyncio.sleep(0.01)
        match fault:
            case "error":
                self._send(writer, 500, error("the server had an error"))
                return True
            case "overload":
                self._send(writer, 429, error("overloaded"), {"Retry-After": "0.05"})
                return True
            case "refused":
                self._send(writer, 400, error("this prompt is not taken"))
                return True
            case "malformed":
                self._send(writer, 200, b'{"choices": [{"message": {"content": "Quest')
                return True
            case "empty":
                self._send(writer, 200, {"choices": []})
                return True
        if self.script.refusal is not None:
            self._send(writer, 400, self.script.refusal)
            return True
        if (raw := self.script.raw(body)) is not None:
            return await self._raw(raw, writer)
        completion = self._completion(body, fault)
        if fault == "dropped":
            return False
        if body.get("stream"):
            return await self._stream(completion, writer, cut=fault == "cut")
        if fault == "cut":
            data = json.dumps(completion).encode()
            writer.write(f"HTTP/1.1 200 X\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data[: len(data) // 2])
            return False
        self._send(writer, 200, completion)
        return True

    def _batched(self, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and body of a request in a batch."""
        match fault := self._fault():
            case "error":
                return 500, error("the server had an error")
            case "refused":
                return 400, error("this prompt is not taken")
        raw = self.script.raw(body)
        return 200, self._completion(body, fault) if raw is None else raw

    def _fault(self) -> str | None:
        dice = self.random.random()
        for name, probability in self.script.faults.items():
            dice -= probability
            if dice < 0:
                return name
        return None

    def _completion(self, body: dict[str, Any], fault: str | None) -> dict[str, Any]:
        self.completions += 1
        text = self.script.reply(body)
        prompt = sum(len(message["content"]) for message in body["messages"]) // 4
        usage: Any = {"prompt_tokens": prompt, "completion_tokens": max(1, len(text or "") // 4)}
        if fault == "no_usage":
            usage = None
        if fault == "wrong_usage":
            usage = {"prompt_tokens": -5, "completion_tokens": "many"}
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": self.script.finish_reason}
        return {
            "id": "c",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [choice],
            "usage": usage,
        }

    async def _raw(self, raw: Any, writer: asyncio.StreamWriter) -> bool:
        if not isinstance(raw, list):
            kind = "text/html" if isinstance(raw, bytes) else "application/json"
            self._send(writer, 200, raw, {"Content-Type": kind})
            return True
        writer.write(b"HTTP/1.1 200 X\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for event in raw:
            self._chunk(writer, b"data: " + json.dumps(event).encode() + b"\n\n")
        self._chunk(writer, b"data: [DONE]\n\n")
        self._chunk(writer, b"")
        return True

    async def _stream(self, completion: dict[str, Any], writer: asyncio.StreamWriter, cut: bool) -> bool:
        writer.write(b"HTTP/1.1 200 X\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        text, usage = completion["choices"][0]["message"]["content"], completion.pop("usage")
        deltas = re.findall(r"(?s).{1,40}", text or "")
        for delta in deltas[: len(deltas) // 2 if cut else None]:
            self._event(writer, completion, [{"index": 0, "delta": {"content": delta}, "finish_reason": None}])
            await asyncio.sleep(0)
        if cut:
            return False
        self._event(writer, completion, [{"index": 0, "delta": {}, "finish_reason": self.script.finish_reason}])
        self._event(writer, completion, [], usage=usage)
        self._chunk(writer, b"data: [DONE]\n\n")
        self._chunk(writer, b"")
        return True

    def _event(self, writer: asyncio.StreamWriter, completion: dict[str, Any], choices: list[Any], **more: Any) -> None:
        event = {**completion, "object": "chat.completion.chunk", "choices": choices, **more}
        self._chunk(writer, b"data: " + json.dumps(event).encode() + b"\n\n")

    def _chunk(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(b"%x\r\n%b\r\n" % (len(data), data))


def error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "scripted", "code": None}}

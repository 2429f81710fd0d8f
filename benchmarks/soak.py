"""Hours of a server's life in minutes: clients that ask well, leave, send garbage and send far too much.

Starts `python -m llava_jax.serve` on a checkpoint and lets clients loose on it for a while. Each draws again and again:

  good      whole or streamed, one or two answers, with and without pictures, follow-ups: must be answered, and where
            they are greedy as they were when nothing else ran
  vanish    leaves in the middle of its body, of its stream, or while it waits
  garbage   malformed JSON, HTTP, fields, paths and pictures: must be refused with 4xx
  oversize  decompression bombs, bodies, prompts and numbers of pictures that are too large: must be refused with 4xx
  bomb      megabytes of JSON that would take seconds and gigabytes to read: must be refused with 4xx
  foreign   other hosts' names, and pages of other sites: must be refused with 403 and 421

Beside them, some clients ask for long streams and read nothing of them, others send half of a request's head, and some
half of its body: the server has to cut them off, each time, and hold nobody else up for them.

After a warm-up the memory of the server has to stay flat; at the end no slot may be held by somebody who is gone.
"""

import argparse
import asyncio
import base64
import dataclasses
import io
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable

import httpx2
import numpy as np
import openai
from PIL import Image

GROWTH = 0.03  # of the memory after the warm-up, above which it counts as a leak
SHARES = {"good": 0.53, "vanish": 0.18, "garbage": 0.13, "oversize": 0.08, "bomb": 0.02, "foreign": 0.06}
STALL = 45  # seconds without reading
CUT_OFF = 120  # seconds after which a client that lingers should have been cut off, however busy the machine is
MODEL = "soak"
QUESTIONS = ("Hello", "what color is the shape?", "is there a circle?", "Describe it.", "What is 2 + 2?")


@dataclasses.dataclass
class Tally:
    """What happened since the warm-up."""

    started: float
    counts: Counter = dataclasses.field(default_factory=Counter)
    seconds: list[float] = dataclasses.field(default_factory=list)  # of good requests, start to end
    first: list[float] = dataclasses.field(default_factory=list)  # of good streams, to the first text
    problems: list[str] = dataclasses.field(default_factory=list)

    def problem(self, kind: str, what: str) -> None:
        self.counts[f"{kind} failed"] += 1
        self.problems.append(f"{kind}: {what}")


class Good:
    """Requests that are in order, and the greedy answers to them when nothing else runs."""

    def __init__(self, url: str):
        self.client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
        pictures = [None, *(data_url(picture(seed)) for seed in range(4))]
        self.conversations = [
            ask(question, url, previous)
            for url in pictures
            for question in QUESTIONS
            for previous in ((), (QUESTIONS[0], "An answer."))
        ]
        self.expected: dict[int, str] = {}

    async def learn(self) -> None:
        for i, messages in enumerate(self.conversations):
            completion = await self._create(messages, temperature=0)
            self.expected[i] = completion.choices[0].message.content

    async def run(self, dice: random.Random, tally: Tally) -> None:
        i = dice.randrange(len(self.conversations))
        greedy, stream, n = dice.random() < 0.5, dice.random() < 0.5, dice.choice((1, 1, 1, 2))
        start = time.monotonic()
        options = {"temperature": 0 if greedy else 2, "n": n, "seed": dice.getrandbits(32), "stream": stream}
        try:
            result = await self._create(self.conversations[i], **options)
            if stream:
                texts = await self._read(result, n, start, tally)
            else:
                texts = [choice.message.content for choice in result.choices]
        except openai.OpenAIError as error:
            return tally.problem("good", f"{type(error).__name__}: {error}")
        tally.counts["good"] += 1
        tally.seconds.append(time.monotonic() - start)
        if len(texts) != n:
            tally.problem("good", f"{len(texts)} answers instead of {n}")
        if greedy and set(texts) != {self.expected[i]}:
            tally.problem("good", f"{texts} instead of {self.expected[i]!r} when alone")

    async def _create(self, messages: list[dict], **options):
        return await self.client.chat.completions.create(model=MODEL, messages=messages, max_tokens=48, **options)

    async def _read(self, stream, n: int, start: float, tally: Tally) -> list[str]:
        texts, reasons = [""] * n, [None] * n
        async for chunk in stream:
            for choice in chunk.choices:
                if choice.delta.content and not any(texts):
                    tally.first.append(time.monotonic() - start)
                texts[choice.index] += choice.delta.content or ""
                reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        if not set(reasons) <= {"stop", "length"}:
            tally.problem("good", f"a stream without an end: {reasons}")
        return texts


class Bad:
    """Those whom no server wants, and has."""

    def __init__(self, url: str):
        self.url = url
        self.host, self.port = url.removeprefix("http://").split(":")
        self.http = httpx2.AsyncClient(base_url=url, timeout=300)
        long = {"temperature": 2, "max_tokens": 400}
        self.long = [
            body(ask(QUESTIONS[0], url), n=n, stream=True, **long) for url in (None, picture_url()) for n in (1, 3)
        ]
        self.garbage = [
            b"",
            b"{",
            b"\xff\xfe",
            b"[" * 50_000,
            body([]),
            body([{"role": "robot", "content": "x"}]),
            body(ask("x"), temperature="hot"),
            body(ask("x"), tools=[{"type": "function"}]),
            body(ask("x"), logit_bias={"1": 2}, surrogate="\ud800"),
            body(ask("x", "data:image/png;base64,AAAA")),
            body(ask("x", "http://169.254.169.254/")),
            body(ask("x", picture_url()[:-400])),
        ]
        self.oversize = [
            body(ask("x", bomb())),
            body(ask("word " * 200_000)),
            body([{"role": "user", "content": [part(picture_url())] * 200}]),
            body(ask("x"), max_tokens=10**6),
            b" " * (33 << 20),
        ]
        much = {"n": 3, "stream": True, "temperature": 2, "max_tokens": 1900, "logprobs": True, "top_logprobs": 20}
        asked = body(ask(QUESTIONS[0]), **much)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\n"
        self.stalled = f"{head}Content-Length: {len(asked)}\r\n\r\n".encode() + asked
        self.lingering = {self.stall: 8, self.send_half_a_head: 40, self.send_half_a_body: 8}  # how many at a time
        self.bombs = [
            body([{"role": "user", "content": [0] * 4_000_000}]),
            body([{"role": "user", "content": "x" * (20 << 20)}]),
            b'{"a":' * 4_000_000,
            b'{"messages":[' + b"9" * (20 << 20),
            b"{" + b",".join(b'"%d":0' % i for i in range(1_000_000)) + b"}",
        ]

    async def vanish(self, dice: random.Random, tally: Tally) -> None:
        data = dice.choice(self.long)
        whole = dice.random() < 0.7
        reader, writer = await asyncio.open_connection(self.host, int(self.port))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
        writer.write(
            f"{head}Content-Type: application/json\r\n\r\n".encode() + (data if whole else data[: len(data) // 2])
        )
        await writer.drain()
        if whole and dice.random() < 0.7:
            await reader.read(dice.choice((1, 1000, 5000)))
        else:
            await asyncio.sleep(dice.random() / 2)
        if dice.random() < 0.5:
            writer.transport.abort()  # a reset instead of a goodbye
        writer.close()
        tally.counts["vanish"] += 1

    async def send_garbage(self, dice: random.Random, tally: Tally) -> None:
        kind = dice.random()
        if kind < 0.1:
            await self._no_http(dice, tally)
        elif kind < 0.2:
            path = dice.choice(("/v1/nothing", "/v1/models/other", "/v1/chat/completions"))
            await self._refused("garbage", tally, self.http.get(path))
        else:
            await self._refused("garbage", tally, self._post(dice.choice(self.garbage)))

    async def send_oversize(self, dice: random.Random, tally: Tally) -> None:
        await self._refused("oversize", tally, self._post(dice.choice(self.oversize)))

    async def send_bomb(self, dice: random.Random, tally: Tally) -> None:
        await self._refused("bomb", tally, self._post(dice.choice(self.bombs)))

    async def come_from_elsewhere(self, dice: random.Random, tally: Tally) -> None:
        headers = dice.choice(({"Host": "evil.test"}, {"Origin": "http://evil.test"}, {"Origin": "null"}))
        path = dice.choice(("/health", "/v1/models", "/"))
        await self._refused("foreign", tally, self.http.get(path, headers=headers))

    async def stall(self, tally: Tally) -> None:
        """Asks for megabytes and reads nothing of them, for longer than the server waits."""
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await self._send(connection, self.stalled)
            await asyncio.sleep(STALL)
        tally.counts["stall"] += 1

    async def send_half_a_head(self, tally: Tally) -> None:
        await self._is_closed("half a head", self.stalled[:50], tally)

    async def send_half_a_body(self, tally: Tally) -> None:
        await self._is_closed("half a body", self.stalled[:-50], tally)

    async def _is_closed(self, kind: str, data: bytes, tally: Tally) -> None:
        with socket.socket() as connection:
            await self._send(connection, data)
            try:
                async with asyncio.timeout(CUT_OFF):
                    while await asyncio.get_running_loop().sock_recv(connection, 4096):
                        pass
            except ConnectionError:
                pass
            except TimeoutError:
                return tally.problem(kind, f"not closed within {CUT_OFF} seconds")
        tally.counts[kind] += 1

    async def _send(self, connection: socket.socket, data: bytes) -> None:
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(connection, (self.host, int(self.port)))
        await loop.sock_sendall(connection, data)

    def _post(self, data: bytes) -> Awaitable[httpx2.Response]:
        return self.http.post("/v1/chat/completions", content=data, headers={"Content-Type": "application/json"})

    async def _no_http(self, dice: random.Random, tally: Tally) -> None:
        reader, writer = await asyncio.open_connection(self.host, int(self.port))
        writer.write(dice.randbytes(200) + b"\r\n\r\n")
        answer = await reader.read()
        writer.close()
        tally.counts["garbage"] += 1
        if answer and not answer.startswith(b"HTTP/1.1 400"):
            tally.problem("garbage", f"noise was answered with {answer[:40]!r}")

    async def _refused(self, kind: str, tally: Tally, request: Awaitable[httpx2.Response]) -> None:
        try:
            response = await request
        except httpx2.TransportError as error:
            return tally.problem(kind, f"{type(error).__name__}: {error}")
        tally.counts[kind] += 1
        if not 400 <= response.status_code < 500 or "error" not in response.json():
            tally.problem(kind, f"answered with {response.status_code} {response.text[:100]}")


# ---------------------------------------------------------------------------------------------------- what is sent


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (60, 80, 3), np.uint8))


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def picture_url() -> str:
    return data_url(picture(0))


def bomb() -> str:
    """A PNG that says it has 400 million pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


def part(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def ask(question: str, url: str | None = None, previous: tuple[str, ...] = ()) -> list[dict]:
    """Messages: perhaps an earlier turn, perhaps a picture, a question."""
    roles = ("user", "assistant")
    messages = [{"role": role, "content": text} for role, text in zip(roles, previous, strict=False)]
    text = {"type": "text", "text": question}
    return [*messages, {"role": "user", "content": [text] if url is None else [text, part(url)]}]


def body(messages: list[dict], **options) -> bytes:
    return json.dumps({"model": MODEL, "messages": messages, **options}).encode()


# ------------------------------------------------------------------------------------------------------ the server


class Server:
    """A server of its own, in a process whose memory can be read."""

    def __init__(self, checkpoint: str, slots: int):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        # Stays, to be read where something went wrong.
        self.log = tempfile.NamedTemporaryFile("w", prefix="soak_", suffix=".log", delete=False)  # noqa: SIM115
        command = [sys.executable, "-m", "llava_jax.serve", "--checkpoint", checkpoint, "--port", str(port)]
        command += ["--slots", str(slots), "--model-name", MODEL]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)

    async def ready(self) -> None:
        async with httpx2.AsyncClient() as http:
            while self.process.poll() is None:
                try:
                    if (await http.get(f"{self.url}/health")).status_code == 200:
                        return
                except httpx2.TransportError:
                    pass
                await asyncio.sleep(0.2)
        raise SystemExit(f"error: the server did not start: see {self.log.name}")

    async def memory(self) -> float:
        """MiB that are resident, once the last requests of those who left are done."""
        samples = []
        for _ in range(10):
            with open(f"/proc/{self.process.pid}/statm") as file:
                samples.append(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)
            await asyncio.sleep(0.3)
        return min(samples)

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    async def metric(self, name: str) -> float:
        async with httpx2.AsyncClient() as http:
            text = (await http.get(f"{self.url}/metrics")).text
        return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{name} "))

    def stop(self) -> int:
        """-> its exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return -1


# -------------------------------------------------------------------------------------------------------- the soak


async def clients(
    number: int, seconds: float, actions: dict[str, Callable], lingering: dict[Callable, int], tally: Tally, seed: int
) -> None:
    """Lets them loose for a while."""
    deadline = time.monotonic() + seconds

    async def client(index: int) -> None:
        dice = random.Random(f"{seed} {index}")
        while time.monotonic() < deadline:
            (kind,) = dice.choices(list(SHARES), list(SHARES.values()))
            await actions[kind](dice, tally)

    async def again(linger: Callable) -> None:
        while True:
            await linger(tally)

    others = [asyncio.create_task(again(linger)) for linger, number in lingering.items() for _ in range(number)]
    await asyncio.gather(*(client(index) for index in range(number)))
    for other in others:
        if other.done():  # it never ends by itself
            other.result()
        other.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def slots_that_work(server: Server, good: Good, slots: int) -> tuple[int, int]:
    """-> slots that are busy though nobody is there, and the most that are when many ask."""
    for _ in range(100):
        held = int(await server.metric("llava_slots_busy") + await server.metric("llava_queue_length"))
        if not held:
            break
        await asyncio.sleep(0.1)
    tally, most = Tally(time.monotonic()), 0
    asking = asyncio.gather(*(good.run(random.Random(i), tally) for i in range(8 * slots)))
    while not asking.done():
        most = max(most, int(await server.metric("llava_slots_busy")))
        await asyncio.sleep(0)
    await asking
    return held, most


async def soak(args: argparse.Namespace, server: Server) -> int:
    print(f"the server's log: {server.log.name}", flush=True)
    await server.ready()
    good, bad = Good(server.url), Bad(server.url)
    actions = {"good": good.run, "vanish": bad.vanish, "garbage": bad.send_garbage, "oversize": bad.send_oversize}
    actions |= {"bomb": bad.send_bomb, "foreign": bad.come_from_elsewhere}
    await good.learn()
    await clients(args.clients, 60 * args.warm_up, actions, bad.lingering, Tally(time.monotonic()), seed=0)
    tally = Tally(time.monotonic())
    memories, files = [await server.memory()], server.open_files()
    for minute in range(args.minutes):
        await clients(args.clients, 60, actions, bad.lingering, tally, seed=minute + 1)
        memories.append(await server.memory())
        print(f"minute {minute + 1}: {dict(tally.counts)}, {memories[-1]:.0f} MiB", flush=True)
    open_files = (files, server.open_files())
    held, most = await slots_that_work(server, good, args.slots)
    report(tally, memories, open_files, held, most, args.slots)
    status = server.stop()
    print(f"SIGTERM: exit status {status}")
    failed = bool(tally.problems) or held or most != args.slots or memories[-1] > (1 + GROWTH) * memories[0] or status
    return 1 if failed else 0


def report(tally: Tally, memories: list[float], files: tuple[int, int], held: int, most: int, slots: int) -> None:
    good, failed = tally.counts["good"], tally.counts["good failed"]
    print(f"good requests: {good} answered, {failed} failed")
    for name, values in (("a whole answer", tally.seconds), ("the first text of a stream", tally.first)):
        p50, p99 = np.percentile(values, (50, 99))
        print(f"seconds to {name}: p50 {p50:.3f}, p99 {p99:.3f}")
    print(
        ", ".join(
            f"{kind}: {tally.counts[kind]}" for kind in [*list(SHARES)[1:], "stall", "half a head", "half a body"]
        )
    )
    middle = memories[len(memories) // 2]
    print(f"resident memory: {memories[0]:.0f} MiB after warm-up, {middle:.0f} half-way, {memories[-1]:.0f} at the end")
    print(f"open files: {files[0]} after warm-up, {files[1]} at the end")
    print(f"slots: {held} held by nobody, {most} of {slots} busy when all are asked")
    for problem, times in Counter(tally.problems).most_common(10):
        print(f"problem, {times} times: {problem[:300]}")


def main(argv: list[str] | None = None) -> int:
    """Exits with 1 where something failed, leaked or got lost."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python benchmarks/soak.py --checkpoint runs/quickstart/finetune --minutes 15",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, metavar="D", help="a small one")
    parser.add_argument("--minutes", type=int, default=15, help="after the warm-up, 15")
    parser.add_argument("--warm-up", type=float, default=1.0, metavar="MINUTES", help="1")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--slots", type=int, default=8)
    args = parser.parse_args(argv)
    server = Server(args.checkpoint, args.slots)
    try:
        return asyncio.run(soak(args, server))
    finally:
        server.stop()


if __name__ == "__main__":
    sys.exit(main())

"""A server of a tiny model in this process, for tests over HTTP."""

import base64
import contextlib
import io
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tiny
import uvicorn
from fastapi import FastAPI
from PIL import Image

from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.inference.engine import Engine
from llava_jax.serve.connection import Limits
from llava_jax.serve.server import http_config, listen


@contextlib.contextmanager
def tiny_engine(directory: Path, **options: int) -> Iterator[Engine]:
    """One that answers with a tiny model, which is written to `directory`."""
    engine = Engine.from_checkpoint(open_checkpoint(tiny.checkpoint(directory)), **options)
    engine.warm_up()
    yield engine
    engine.close(drain=False)


@contextlib.contextmanager
def serving(app: FastAPI, limits: Limits | None = None) -> Iterator[str]:
    """-> the URL of a server in a thread, on a port of its own."""
    socket = listen("127.0.0.1", 0)
    config = http_config(app, limits or Limits(), log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([socket],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    server.should_exit = True
    thread.join()


def noise_image(seed: int = 0, size: tuple[int, int] = (24, 20)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def bomb(side: int) -> bytes:
    """A PNG of `side` x `side` pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def eventually(condition) -> bool:
    """Waits until it is true: only pytest's timeout ends a wait in vain."""
    while not condition():
        time.sleep(0.01)
    return True

"""Pictures of a request: from a URL to the square that the vision tower sees.

A picture is brought to that size as soon as it is decoded, a few at a time: what waits in the queue is small, however
large the pictures were that came in.
"""

import binascii
import os
import urllib.parse
from collections.abc import Callable, Sequence

import anyio
import numpy as np
from PIL import Image

from llava_jax.cli import UserError
from llava_jax.data.images import decode_image, preprocess
from llava_jax.models.config import LlavaConfig
from llava_jax.serve.errors import ApiError
from llava_jax.serve.fetch import fetch

MAX_PIXELS = 64_000_000  # 192 MB once decoded
MAX_REMOTE_BYTES = 20_000_000


class Reader:
    """Reads the pictures of requests.

    Args:
      preprocess: a picture to uint8[H, W, 3] at the size of the vision tower.
      allow_remote: whether http(s) URLs are fetched.
    """

    def __init__(self, preprocess: Callable[[Image.Image], np.ndarray], allow_remote: bool = False):
        self._preprocess = preprocess
        self._allow_remote = allow_remote
        self._decoding = anyio.CapacityLimiter(min(4, os.cpu_count() or 1))

    @classmethod
    def of(cls, config: LlavaConfig, allow_remote: bool = False) -> "Reader":
        """Reads as a model wants its pictures."""
        size, aspect, mean = config.vision.image_size, config.image_aspect, config.image_mean
        return cls(lambda image: preprocess(image, size, aspect, mean), allow_remote)

    async def read(self, urls: Sequence[tuple[str, str]]) -> list[Image.Image]:
        """The pictures at (field of the request, URL). Raises ApiError naming the field."""
        pictures = []
        for field, url in urls:
            try:
                data = await self._bytes(url)
                pictures.append(await self._in_thread(self._square, data, "of the request"))
            except UserError as error:
                raise ApiError(400, f"{field}: {error}", "invalid_image", field) from error
        return pictures

    async def _in_thread(self, function: Callable[..., Image.Image], *args: bytes | str) -> Image.Image:
        return await anyio.to_thread.run_sync(function, *args, limiter=self._decoding)

    async def _bytes(self, url: str) -> bytes:
        if url[:5].lower() == "data:":
            return decode_data_url(url)
        if not self._allow_remote:
            raise UserError("this server fetches no pictures: send it as a data URL, data:image/jpeg;base64,...")
        try:
            return await fetch(url, MAX_REMOTE_BYTES)
        except UserError as error:
            raise UserError(f"the picture's URL {error}") from error

    def _square(self, data: bytes, name: str) -> Image.Image:
        return Image.fromarray(self._preprocess(decode_image(data, name, MAX_PIXELS)))


def decode_data_url(url: str) -> bytes:
    """The bytes of `data:...;base64,...`. What type it says does not matter: the data itself tells."""
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise UserError("a data URL has to look like data:image/jpeg;base64,...")
    if "%" in data:
        data = urllib.parse.unquote(data)
    try:
        return binascii.a2b_base64(data)
    except ValueError as error:
        raise UserError(f"the data URL is no base64: {error}") from error

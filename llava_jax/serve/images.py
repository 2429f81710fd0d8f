"""Images of a request: from a URL to the preprocessed image that the vision tower sees.

An image is preprocessed as soon as it is decoded, so that what waits in the queue is small, however large the uploads
were. All requests share one memory budget for decoding.
"""

import asyncio
import binascii
import contextlib
import hashlib
import os
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Collection, Hashable, Sequence

import anyio
from PIL import Image

from llava_jax.cli import UserError
from llava_jax.data.images import EncodedImage, open_image
from llava_jax.inference.requests import PreparedImage
from llava_jax.serve.errors import ApiError
from llava_jax.serve.fetch import fetch

MAX_PIXELS = 64_000_000
MAX_REMOTE_BYTES = 20_000_000
DECODING_BYTES = 640 << 20  # of all images that are being decoded
CACHE_BYTES = 64 << 20  # of preprocessed images
Preprocess = Callable[[Image.Image], PreparedImage]  # see `PromptEncoder.read`
_ESCAPES = {"%2B": "+", "%2F": "/", "%3D": "=", "%20": " ", "%0A": "\n", "%0D": "\r"}  # what base64 may need
LARGE_BYTES = 32 << 20  # images of at least this size, decoded, use all threads but one: small ones pass them


class Budget:
    """Bytes that may be in use at a time. `take` waits until enough are free; smaller amounts may overtake it."""

    def __init__(self, total: int):
        self.total = self.left = total
        self._freed = asyncio.Event()

    @contextlib.asynccontextmanager
    async def take(self, amount: int) -> AsyncIterator[None]:
        """Raises `UserError` for more than the total."""
        if amount > self.total:
            raise UserError(
                f"takes {amount >> 20} MiB to decode, and this server has {self.total >> 20} MiB for that: shrink it"
            )
        while amount > self.left:
            await self._freed.wait()
        self.left -= amount
        try:
            yield
        finally:
            self.left += amount
            self._freed.set()
            self._freed = asyncio.Event()


class ImageReader:
    """Reads the images of requests.

    Args:
      allow_remote: whether http(s) URLs are fetched.
      hosts: from which alone they are fetched, such as `images.example.org` or `*.example.org`; all if there are none.
      decoding_bytes: for all images that are being decoded.
    """

    def __init__(
        self,
        allow_remote: bool = False,
        hosts: Collection[str] = (),
        decoding_bytes: int = DECODING_BYTES,
    ):
        self._allow_remote, self._hosts = allow_remote, hosts
        self._budget = Budget(decoding_bytes)
        self._cache: OrderedDict[Hashable, PreparedImage] = OrderedDict()  # the least recently used first
        self._cached_bytes = 0
        threads = min(4, os.cpu_count() or 1)
        self._small, self._large = anyio.CapacityLimiter(threads), anyio.CapacityLimiter(max(1, threads - 1))

    async def read(
        self, urls: Sequence[tuple[str, str]], preprocess: Preprocess, settings: Hashable = None
    ) -> list[PreparedImage]:
        """The images at (field of the request, URL). Raises `ApiError` that names the field.

        Images of the same bytes and `settings`, all that `preprocess` depends on, are decoded once; None: always.
        """
        images = []
        for field, url in urls:
            try:
                images.append(await self._read(url, preprocess, settings))
            except UserError as error:
                message = str(error).replace(f" ({error.__cause__})", "")  # clients do not see the decoder's message
                raise ApiError(400, f"{field}: {message}", "invalid_image", field) from error
        return images

    async def _read(self, url: str, preprocess: Preprocess, settings: Hashable) -> PreparedImage:
        if url[:5].lower() == "data:":
            data = await anyio.to_thread.run_sync(decode_data_url, url, limiter=self._small)
        elif not self._allow_remote:
            raise UserError("this server fetches no images: send it as a data URL, data:image/jpeg;base64,...")
        else:
            try:
                data = await fetch(url, MAX_REMOTE_BYTES, self._hosts)
            except UserError as error:
                raise UserError(f"the image's URL {error}") from error
        key = settings and (settings, hashlib.sha256(data).digest())
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        image = await self._decode(lambda: open_image(data, "of the request", MAX_PIXELS), preprocess)
        if key and key not in self._cache:
            self._cache[key] = image
            self._cached_bytes += image.tiles.nbytes
            while self._cached_bytes > CACHE_BYTES:
                self._cached_bytes -= self._cache.popitem(last=False)[1].tiles.nbytes
        return image

    async def _decode(self, open_encoded: Callable[[], EncodedImage], preprocess: Preprocess) -> PreparedImage:
        encoded = await anyio.to_thread.run_sync(open_encoded, limiter=self._small)
        amount = encoded.decoded_bytes
        limiter = self._small if amount < LARGE_BYTES else self._large
        async with self._budget.take(amount):
            return await anyio.to_thread.run_sync(lambda: preprocess(encoded.decode()), limiter=limiter)


def decode_data_url(url: str) -> bytes:
    """The bytes of `data:...;base64,...`. The media type is ignored, as the data shows its type. White space, escapes
    and missing padding are accepted, as in browsers. Raises `UserError` for all other characters outside base64."""
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise UserError("a data URL has to look like data:image/jpeg;base64,...")
    for code, character in _ESCAPES.items():
        data = data.replace(code, character).replace(code.lower(), character)
    try:
        data = data.encode("ascii").translate(None, delete=b" \t\r\n\f").rstrip(b"=")
        return binascii.a2b_base64(data + b"=" * (-len(data) % 4), strict_mode=True)
    except ValueError as error:
        raise UserError("the data URL is no base64") from error

"""Pictures of requests: data URLs, files that are none, and the web, which here is this machine."""

import asyncio
import base64
import http.server
import io
import threading

import anyio
import numpy as np
import pytest
from PIL import ExifTags, Image
from serving import bomb, data_url, noise_image

from llava_jax.cli import UserError
from llava_jax.data.images import ASPECTS, load_image, preprocess
from llava_jax.data.tokenization import one_tile
from llava_jax.inference.requests import PreparedImage
from llava_jax.serve import fetch, images
from llava_jax.serve.errors import ApiError

MEAN = (0.48, 0.46, 0.41)


def square(aspect: str = "pad"):
    return lambda image: preprocess(image, 16, aspect, MEAN)


def read(url: str, **options) -> Image.Image:
    return asyncio.run(images.ImageReader(**options).read([("here", url)], square()))[0]


def refusal(url: str, **options) -> str:
    with pytest.raises(ApiError) as error:
        read(url, **options)
    assert (error.value.status_code, error.value.code, error.value.param) == (400, "invalid_image", "here")
    return error.value.detail


def encoded(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


@pytest.mark.parametrize("aspect", ASPECTS)
def test_a_picture_that_has_its_size_already_stays_as_it_is(aspect):
    """Pictures are brought to size before they wait, and the engine does it again."""
    once = square(aspect)(noise_image(size=(23, 31)))
    assert np.array_equal(square(aspect)(Image.fromarray(once)), once)


@pytest.mark.parametrize(
    "change",
    [
        lambda url: url,
        lambda url: url.replace("image/png", "application/octet-stream"),
        lambda url: url.replace("data:", "DATA:").replace(";base64", ";name=a.png;base64"),
        lambda url: url.replace("+", "%2B").replace("=", "%3D"),
        lambda url: url[:60] + "\n" + url[60:],
        lambda url: url[:60] + " \r\n\t%0d%0A%20" + url[60:],
        lambda url: url.rstrip("="),
    ],
)
def test_data_urls(change):
    assert np.array_equal(np.asarray(read(change(data_url(noise_image())))), square()(noise_image()))


def _saved(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def _rotated() -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return _saved(noise_image(), "JPEG", exif=exif)


def _palette(transparent: bytes) -> bytes:
    """A PNG with a palette of which each colour is more or less transparent."""
    image = noise_image().quantize(8)
    return _saved(image, "PNG", transparency=transparent)


KINDS = {
    "CMYK": lambda: _saved(noise_image().convert("CMYK"), "JPEG"),
    "palette with alpha": lambda: _palette(bytes(range(0, 256, 32))),
    "grey with alpha": lambda: _saved(noise_image().convert("LA"), "PNG"),
    "rotated by EXIF": _rotated,
    "16-bit grey": lambda: _saved(Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 109), "PNG"),
    "1 bit": lambda: _saved(noise_image().convert("1"), "PNG"),
    "animation": lambda: _saved(noise_image(0), "GIF", save_all=True, append_images=[noise_image(1)]),
    "WebP": lambda: _saved(noise_image(), "WEBP"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_is_the_picture_that_training_sees(kind, tmp_path):
    (tmp_path / "file").write_bytes(KINDS[kind]())
    trained = square()(load_image(tmp_path / "file"))
    assert trained.std() > 10
    assert np.array_equal(np.asarray(read(encoded(KINDS[kind]()))), trained)


def _truncated() -> bytes:
    return _saved(noise_image(size=(50, 50)), "JPEG")[:-100]


@pytest.mark.parametrize(
    "url, what",
    [
        (encoded(bomb(9_000)), "9000 x 9000 pixels are more than 64000000"),
        (encoded(bomb(50_000)), "is refused"),
        (encoded(_truncated()), "damaged"),
        (encoded(b"no picture"), "damaged or none of JPEG"),
        (encoded(b""), "damaged"),
        ("data:image/png;base64,a", "no base64"),
        ("data:image/png;base64,é", "no base64"),
        ("data:image/png;base64,AA==AAAA", "no base64"),
        ("data:image/png;base64,AA_-AAAA", "no base64"),  # whose bits would be those of another image without `_-`
        ("data:image/png;base64,AA%41A", "no base64"),
        ("data:image/png;base64," + "%41" * 1_000_000, "no base64"),
        ("data:image/png,abc", "data:image/jpeg;base64"),
        ("data:", "data:image/jpeg;base64"),
        ("https://example.com/a.png", "fetches no images"),
        ("file:///etc/passwd", "fetches no images"),
        ("", "fetches no images"),
    ],
)
def test_what_is_no_picture_is_refused_by_its_place(url, what):
    assert what in refusal(url)


@pytest.mark.parametrize("data", [_truncated(), b"no picture", encoded(_truncated())[:-9].encode()])
def test_what_the_decoder_says_is_not_for_clients(data):
    message = refusal(encoded(data))
    assert "damaged" in message and "0x" not in message and "(" not in message


def test_large_images_wait_for_each_other_and_small_ones_for_nobody(monkeypatch):
    """The sum of what is being decoded stays within the budget."""
    monkeypatch.setattr(images, "LARGE_BYTES", 100 * 100 * 4)
    large, small = data_url(noise_image(size=(100, 100))), data_url(noise_image(size=(10, 10)))
    taken, release, order = [], threading.Event(), []

    def slow(image: Image.Image) -> np.ndarray:
        if image.width == 100:
            taken.append(reader._budget.total - reader._budget.left)
            release.wait()
        order.append(image.width)
        return square()(image)

    reader = images.ImageReader(decoding_bytes=100 * 100 * 4 + 10 * 10 * 4)
    reader._large = anyio.CapacityLimiter(4)  # the budget alone limits them

    async def all_at_once() -> None:
        many = [asyncio.create_task(reader.read([("here", large)], slow)) for _ in range(4)]
        while not taken:
            await asyncio.sleep(0.001)
        await reader.read([("here", small)], slow)
        many[-1].cancel()  # its client left
        release.set()
        await asyncio.gather(*many, return_exceptions=True)

    asyncio.run(all_at_once())
    assert order == [10, 100, 100, 100]
    assert max(taken) == 100 * 100 * 4
    assert reader._budget.left == reader._budget.total


def test_an_image_that_takes_more_than_there_is():
    reader = images.ImageReader(decoding_bytes=1000)
    with pytest.raises(ApiError, match="to decode, and this server has"):
        asyncio.run(reader.read([("here", data_url(noise_image()))], square()))


# -------------------------------------------------------------------------------------------------------- the web


class Web(http.server.BaseHTTPRequestHandler):
    """`/image`, and what a server may do instead of sending one."""

    def do_GET(self):
        match self.path.split("/")[1]:
            case "image":
                self._send(200, base64.b64decode(data_url(noise_image()).partition(",")[2]))
            case "to":
                self._send(302, location=self.path.removeprefix("/to/").replace("|", "/"))
            case "loop":
                self._send(302, location="/loop")
            case "large":
                self._send(200, b"x" * (images.MAX_REMOTE_BYTES + 1))
            case "slow":
                self.rfile.read(1)  # until the client leaves
            case "host":
                self._send(200, self.headers["Host"].encode())
            case _:
                self._send(404)

    def _send(self, status: int, body: bytes = b"", location: str | None = None) -> None:
        self.send_response(status)
        if location:
            self.send_header("Location", location)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def web(monkeypatch):
    """A server at 127.0.0.1, which alone counts as public here. -> its port"""
    monkeypatch.setattr(fetch, "_is_public", lambda address: address == "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_a_picture_of_the_web(web):
    for path in ("image", "to/|image", f"to/http:||127.0.0.1:{web}|image"):
        image = read(f"http://127.0.0.1:{web}/{path}", allow_remote=True)
        assert np.array_equal(np.asarray(image), square()(noise_image()))


def test_only_some_hosts_may_be_fetched_from(web):
    for hosts in (["127.0.0.1"], ["*.0.0.1", "example.org"], ["*"]):
        read(f"http://127.0.0.1:{web}/to/|image", allow_remote=True, hosts=hosts)
    for host, path in (("127.0.0.1", "image"), ("LOCALHOST", f"to/http:||127.0.0.1:{web}|image")):
        what = refusal(f"http://{host}:{web}/{path}", allow_remote=True, hosts=["example.org", "*.example.org"])
        assert "a host that this server does not fetch from" in what


def test_an_image_is_decoded_once_for_all_that_send_its_bytes(monkeypatch):
    calls = []

    def preprocess(image: Image.Image) -> PreparedImage:
        calls.append(image.size)
        return PreparedImage(np.zeros((1, 8, 8, 3), np.uint8), one_tile(4))

    async def read_all() -> None:
        reader = images.ImageReader()
        first, second = data_url(noise_image(0)), data_url(noise_image(1))
        for url, settings in ((first, "a"), (first.replace("image/png", "image/x"), "a"), (first, "b"), (first, None)):
            await reader.read([("here", url)], preprocess, settings)
        assert len(calls) == 3
        monkeypatch.setattr(images, "CACHE_BYTES", 2 * 8 * 8 * 3)  # of two: a third takes the place of the oldest
        for url in (second, first):
            await reader.read([("here", url)], preprocess, "a")
        assert len(calls) == 5

    asyncio.run(read_all())


@pytest.mark.parametrize(
    "path, what",
    [
        ("nothing", "status 404"),
        ("loop", "redirected more than 3 times"),
        ("large", "more than 20000000 bytes"),
        ("slow", "more than 0 seconds"),
        ("host", "damaged or none of"),
        ("to/http:||127.0.0.2:1|", "not public"),
        ("to/http:||[::1]:1|", "not public"),
        ("to/file:||etc|passwd", "no http or https"),
    ],
)
def test_what_the_web_may_answer_instead(web, path, what, monkeypatch):
    if path == "slow":
        monkeypatch.setattr(fetch, "SECONDS", 0.1)
    assert what in refusal(f"http://127.0.0.1:{web}/{path}", allow_remote=True)


@pytest.mark.parametrize(
    "url, what",
    [
        ("http://127.0.0.1/", "not public"),
        ("http://2130706433/", "not public"),
        ("http://localhost:8000/", "not public"),
        ("http://[::ffff:10.0.0.1]/", "not public"),
        ("http://169.254.169.254/latest/meta-data", "not public"),
        ("http://100.64.0.1/", "not public"),
        ("http://0.0.0.0/", "not public"),
        ("ftp://example.com/", "no http or https"),
        ("http:///a", "no http or https"),
        ("http://a\0b/", "no valid URL"),
        ("http://" + "a" * 70, "no valid URL"),
        ("nonsense", "no http or https"),
        ("http://example.com/" + "a" * 9000, "more than 8192 characters"),
    ],
)
def test_urls_that_lead_nowhere_or_inside(url, what):
    assert what in refusal(url, allow_remote=True)


ADDRESSES = (
    *("127.1.2.3", "10.0.0.1", "172.16.0.1", "192.168.0.1", "100.64.0.1", "169.254.169.254", "0.0.0.0", "224.0.0.1"),
    *("::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::1", "2002:7f00:1::", "2001::1"),
    *("192.0.0.8", "192.0.0.9", "168.63.129.16", "192.88.99.1", "198.18.0.1", "203.0.113.1", "255.255.255.255"),
    *("::ffff:168.63.129.16", "::ffff:192.88.99.1", "64:ff9b::808:808", "3fff::1", "5f00::1", "100::1", "2001:2::1"),
    *("fe80::1%eth0", "fec0::1", "fd00::1", "fd00:ec2::254", "ff02::1", "2001:db8::1"),
)


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_that_are_not_public(address):
    with pytest.raises(UserError, match="not public"):
        fetch.public_address([address])


def test_one_private_address_among_public_ones_is_enough():
    assert fetch.public_address(["8.8.8.8", "2001:4860:4860::8888", "::ffff:8.8.8.8"]) == "8.8.8.8"
    with pytest.raises(UserError, match="not public"):
        fetch.public_address(["8.8.8.8", "10.0.0.1"])


def test_the_address_that_was_checked_is_the_one_connected_to(web, monkeypatch):
    """A name server cannot answer one thing to the check and another to the connection: it is asked once."""
    asked = []

    async def lookup(self, host, port, **options):
        asked.append(host)
        return [(2, 1, 6, "", ("127.0.0.1" if len(asked) == 1 else "127.0.0.2", port))]

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", lookup)
    body = asyncio.run(fetch.fetch(f"http://rebinding.example:{web}/host", 100))
    assert body == f"rebinding.example:{web}".encode()
    assert asked == ["rebinding.example"]

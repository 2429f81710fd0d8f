"""Names that the server answers to, and pages that it answers."""

import asyncio
import json
import socket

import pytest

from llava_jax.serve.hosts import Hosts, allowed_names, allowed_origin, own_names

PAGE = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}


def status(headers, path="/v1/models", method="GET", server=("10.1.2.3", 8000), names=(), origins=()) -> int:
    """What a request with these headers, as pairs or as a dict, is answered with."""
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    pairs = headers.items() if isinstance(headers, dict) else headers
    raw = [(name.encode(), value.encode("latin-1")) for name, value in pairs]
    scope = {"type": "http", "path": path, "method": method, "headers": raw, "server": server}
    asyncio.run(Hosts(app, names, origins)(scope, None, send))
    if sent[0]["status"] != 200:
        assert set(json.loads(sent[1]["body"])["error"]) == {"message", "type", "param", "code"}
    return sent[0]["status"]


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LOCALHOST:8000", "localhost.:8000", "a.localhost:1"),
        *("127.0.0.1:8000", "127.9.9.9", "[::1]:8000", "10.1.2.3:8000"),
    ],
)
def test_known_hosts(host):
    assert status({"host": host}) == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.test", "evil.test:8000", "localhost.evil.test", "127.0.0.1.evil.test", "evillocalhost", "10.1.2.4"),
        *("", " ", "localhost:8000:1", "user@localhost", "localhost/", "localhost, evil.test", "[::2]", "["),
        *("\xe9", ":80", "evil.test.", ".", "localhost.."),
    ],
)
def test_unknown_hosts(host):
    assert status({"host": host}) == 421


def test_no_host_and_several():
    assert status({}) == 421
    assert status({}, path="/health") == 200
    assert status({"host": "evil.test"}, path="/health") == 421
    assert status([("host", "localhost"), ("host", "localhost")]) == 421


def test_allowed_hosts():
    names = allowed_names("llava.example.org, *.Example.net,[FE80::1]")
    for host in ("llava.example.org", "a.example.net:80", "a.b.example.net", "[fe80:0::1]:8000", "localhost"):
        assert status({"host": host}, names=names) == 200
    for host in ("example.org", "example.net", "a.llava.example.org"):
        assert status({"host": host}, names=names) == 421
    assert status({"host": "anything"}, names=["*"]) == 200
    for bad in ("", "http://a", "a b", "a/b", "a*"):
        with pytest.raises(ValueError):
            allowed_names(bad)


def test_ipv6_sockets_that_take_ipv4():
    assert status({"host": "10.1.2.3:8000"}, server=("::ffff:10.1.2.3", 8000)) == 200


@pytest.mark.parametrize(
    "host, origin, expected",
    [
        ("localhost:8000", "http://localhost:8000", 200),
        ("localhost", "http://localhost", 200),
        ("localhost", "http://localhost:80", 200),
        ("llava.example.org", "https://llava.example.org", 200),  # behind nginx
        ("llava.example.org:8443", "https://llava.example.org:8443", 200),
        ("localhost:8000", "http://localhost:3000", 403),
        ("localhost:8000", "http://127.0.0.1:8000", 403),
        ("localhost:8000", "http://evil.test", 403),
        ("localhost:8000", "null", 403),
        ("localhost:8000", "", 403),
        ("localhost:8000", "file://", 403),
        ("localhost:8000", "chrome-extension://localhost:8000", 403),
        ("localhost:8000", "http://localhost:8000.evil.test", 403),
        ("localhost:8000", "http://localhost:8000/", 403),
        ("evil.test", "http://evil.test", 421),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_origins(host, origin, expected, method):
    headers = {"host": host, "origin": origin}
    for path in ("/health", "/v1/chat/completions", "/"):
        assert status(headers, path, method, names=["llava.example.org"]) == expected


def test_allowed_origins():
    origins = [allowed_origin("https://App.example.org")]
    assert status({"host": "localhost", "origin": "https://app.example.org"}, origins=origins) == 200
    assert status({"host": "localhost", "origin": "http://app.example.org"}, origins=origins) == 403
    assert allowed_origin("https://a.example:443") == allowed_origin("https://a.example") == "https://a.example"
    assert allowed_origin("http://a.example:443") == "http://a.example:443"
    twice = [("host", "localhost"), ("origin", "https://app.example.org"), ("origin", "http://evil.test")]
    assert status(twice, origins=origins) == 403
    for bad in ("*", "null", "https://a/b", "app.example.org", "https://", "https://a b"):
        with pytest.raises(ValueError):
            allowed_origin(bad)


@pytest.mark.parametrize(
    "headers, path, expected",
    [
        (PAGE, "/", 200),
        (PAGE, "/v1/models", 403),
        (PAGE | {"sec-fetch-dest": "iframe"}, "/", 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"}, "/health", 403),
        ({"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"}, "/", 403),
        ({"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}, "/v1/models", 200),
        ({"sec-fetch-site": "none", "sec-fetch-mode": "navigate"}, "/v1/models", 200),
    ],
)
def test_requests_of_browsers_without_an_origin(headers, path, expected):
    assert status({"host": "localhost"} | headers, path) == expected


def test_own_names():
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("0.0.0.0", 0)) as every:
        assert own_names("MyHost", one) == ["myhost"]
        assert own_names("0.0.0.0", every) == [socket.gethostname().lower()]

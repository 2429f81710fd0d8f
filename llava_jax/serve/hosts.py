"""Checks the `Host` and `Origin` headers: which host names the server accepts, and the web pages of which sites.

A page of another site can make a browser send requests to this server. The browser names that site in `Origin`, unless
the site's own name resolves to this server's address (DNS rebinding): then its name is in `Host`.
"""

import ipaddress
import re
import socket
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from llava_jax.serve.errors import ApiError

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::([0-9]{1,5}))?")
_PORTS = {"http": "80", "https": "443"}
_API = ("/v1/", "/metrics", "/tokenize", "/detokenize")


class Hosts:
    """ASGI middleware: refuses requests to unknown hosts with 421, and requests from pages of other sites with 403.

    Known hosts are loopback names, the address that the client connected to, and `names`.

    Args:
      app: the next application.
      names: `llava.example.org`, `*.example.org`, or `*` for all.
      origins: sites whose pages may use the API, such as `https://app.example.org`.
    """

    def __init__(self, app: ASGIApp, names: Collection[str] = (), origins: Collection[str] = ()):
        self.app, self.names, self.origins = app, {"localhost", "*.localhost", *names}, frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["type"] == "http":
                self._check(scope, Headers(scope=scope))
        except ApiError as error:
            return await error.response()(scope, receive, send)
        await self.app(scope, receive, send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        unnamed = not hosts and scope["path"] == "/health"  # load balancers may speak HTTP/1.0 without a Host
        if not unnamed and (len(hosts) != 1 or not self._knows(hosts[0], scope)):
            name = hosts[0] if len(hosts) == 1 else f"{len(hosts)} Host headers"
            what = f"this server is not known as {name[:100]!r}: if it should be, start it with --allowed-hosts"
            raise ApiError(421, what, "unknown_host")
        if origins and not (len(origins) == 1 and (origins[0] in self.origins or _same_site(origins[0], hosts))):
            what = f"pages of {origins[0][:100]!r} may not use this server: start it with --allow-origin if they should"
            raise ApiError(403, what, "foreign_origin")
        foreign = not origins and headers.get("sec-fetch-site") in ("cross-site", "same-site")
        if foreign and not _opens_the_page(scope, headers):
            raise ApiError(403, "pages of other sites may only link to the page of this server", "foreign_origin")

    def _knows(self, value: str, scope: Scope) -> bool:
        if "*" in self.names:
            return True
        host, _ = split_host(value)
        connected, _ = scope.get("server") or (None, None)
        if host is None or host in self.names or host == _plain(str(connected)):
            return host is not None
        return matches(host, self.names) or _is_loopback(host)


def matches(host: str, names: Collection[str]) -> bool:
    """Whether `names` has the host, `*.` with a part of it, or `*`."""
    parents = host.split(".")
    return any(name in names for name in ("*", host, *(".".join(["*", *parents[i:]]) for i in range(1, len(parents)))))


def allowed_names(text: str) -> list[str]:
    """`--allowed-hosts`: names separated by commas."""
    names = [_plain(name.strip().lower()) for name in text.split(",")]
    for name in names:
        if name != "*" and split_host(f"[{name}]" if ":" in name else name.removeprefix("*."))[0] is None:
            raise ValueError(name)
    return names


def allowed_origin(text: str) -> str:
    """`--allow-origin`: the origin that a browser sends for a page, `https://app.example.org`."""
    scheme, _, rest = text.lower().partition("://")
    if not re.fullmatch("[a-z][a-z0-9+.-]*", scheme) or split_host(rest)[0] is None:
        raise ValueError(text)
    return f"{scheme}://{rest.removesuffix(f':{_PORTS.get(scheme)}')}"  # browsers omit the default port


def own_names(host: str, bound: socket.socket) -> list[str]:
    """Names of this machine that clients may use if it listens at `host`."""
    if not ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_unspecified:
        return [_plain(host.lower())]
    return [socket.gethostname().lower()]


def split_host(value: str) -> tuple[str | None, str | None]:
    """The name or address and the port of a `Host` header; (None, None) for an invalid one."""
    match = _HOST.fullmatch(value.lower())
    return (_plain(match[1]), match[2]) if match else (None, None)


def _plain(host: str) -> str:
    """An address in canonical form without brackets; a name as it is."""
    host = host.removeprefix("[").removesuffix("]").partition("%")[0].removesuffix(".")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    return str(getattr(address, "ipv4_mapped", None) or address)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _same_site(origin: str, hosts: list[str]) -> bool:
    """Whether `origin` is this server itself. A proxy may speak https for it."""
    scheme, _, rest = origin.lower().partition("://")
    if scheme not in _PORTS or not hosts:
        return False
    (name, port), (own, own_port) = split_host(rest), split_host(hosts[0])
    return name is not None and (name, port or _PORTS[scheme]) == (own, own_port or _PORTS[scheme])


def _opens_the_page(scope: Scope, headers: Headers) -> bool:
    """Whether the user follows a link."""
    fetch = headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")
    return scope["method"] == "GET" and fetch == ("navigate", "document") and not scope["path"].startswith(_API)

"""Fetches images from the web without giving access to the server's own network (SSRF).

At each connection, redirects included, the host name is resolved once, and the connection goes to the address that was
checked: a name server that answers differently the second time gains nothing.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Collection, Iterable
from pathlib import Path

import httpcore2 as httpcore
import httpx2 as httpx

from llava_jax.cli import UserError
from llava_jax.serve.hosts import matches

SECONDS = 15.0  # in total: name resolution, redirects and the image
REDIRECTS = 3
_SCHEMES = ("http", "https")
MAX_URL = 8192  # characters
_UNICAST = ipaddress.ip_network("2000::/3")  # all IPv6 addresses of hosts on the internet
# Ranges that some versions of Python's `is_global` accept: internal services of clouds and providers, relays, and IPv6
# ranges that embed IPv4 addresses, possibly private ones, or are for documentation.
_REFUSED = [ipaddress.ip_network(line) for line in Path(__file__).with_name("refused_networks.txt").read_text().split()]


async def fetch(url: str, max_bytes: int, hosts: Collection[str] = ()) -> bytes:
    """The body at `url`. Raises `UserError` for an address that is not public, a host that is not among `hosts`, if
    there are any, and a large, slow or missing body."""
    try:
        async with asyncio.timeout(SECONDS):
            return await _follow(url, max_bytes, hosts)
    except TimeoutError as error:
        raise UserError(f"took more than {SECONDS:.0f} seconds") from error
    except socket.gaierror as error:
        raise UserError("leads to a host that is not known") from error
    except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
        raise UserError("cannot be fetched") from error
    except (httpx.InvalidURL, ValueError) as error:
        raise UserError("is no valid URL") from error


async def _follow(address: str, max_bytes: int, hosts: Collection[str]) -> bytes:
    if len(address) > MAX_URL:
        raise UserError(f"has more than {MAX_URL} characters")
    url = httpx.URL(address)
    headers = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "llava_jax"}
    async with httpcore.AsyncConnectionPool(network_backend=_PublicNetwork()) as pool:
        for _ in range(REDIRECTS + 1):
            if url.scheme not in _SCHEMES or not url.host:
                raise UserError("is no http or https URL")
            if hosts and not matches(url.host.lower(), hosts):
                raise UserError("leads to a host that this server does not fetch from")
            target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
            async with pool.stream("GET", target, headers={"Host": url.netloc.decode(), **headers}) as response:
                location = httpx.Headers(response.headers).get("location")
                if location is None or not 300 <= response.status < 400:
                    return await _read(response, max_bytes)
                url = url.join(location[:MAX_URL])
    raise UserError(f"was redirected more than {REDIRECTS} times")


async def _read(response: httpcore.Response, max_bytes: int) -> bytes:
    if response.status != 200:
        raise UserError(f"was answered with status {response.status}")
    body = bytearray()
    async for chunk in response.aiter_stream():
        body += chunk
        if len(body) > max_bytes:
            raise UserError(f"has more than {max_bytes} bytes")
    return bytes(body)


class _PublicNetwork(httpcore.AsyncNetworkBackend):
    """Connects only to public addresses. The pool above it still checks certificates by host name."""

    def __init__(self) -> None:
        self._backend = httpcore.AnyIOBackend()

    async def connect_tcp(self, host: str, port: int, timeout=None, local_address=None, socket_options=None):
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        address = public_address(sockaddr[0] for *_, sockaddr in found)
        return await self._backend.connect_tcp(address, port, timeout, local_address, socket_options)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def public_address(addresses: Iterable[str]) -> str:
    """The first of a host's addresses. Raises `UserError` if there is none, or any of them is not public."""
    addresses = list(addresses)
    if not addresses or not all(map(_is_public, addresses)):
        raise UserError("leads to an address that is not public")
    return addresses[0]


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        if ip.ipv4_mapped is not None:
            return _is_public(str(ip.ipv4_mapped))
        if ip not in _UNICAST:
            return False
    return ip.is_global and not any(ip in network for network in _REFUSED if network.version == ip.version)

"""Fetches images that requests name by URL, only from hosts that the configuration allows and never from inside.

Engines never fetch. A name is resolved once and the connection goes to the address that was checked, so a name whose
address changes (DNS rebinding) reaches nothing. Every redirect is a new URL with all checks. A response is limited in
size and time, and must be an image by its own bytes. On the worker's event loop.
"""

from __future__ import annotations

import asyncio
import base64
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from fnmatch import fnmatchcase
from urllib.parse import urljoin, urlsplit

from llm_api_server.config.models import MediaConfig
from llm_api_server.errors import InvalidRequest
from llm_api_server.gateway.media.image_size import BrokenImage, read_size
from llm_api_server.gateway.media.public_addresses import is_public
from llm_api_server.http_client.address import Address
from llm_api_server.http_client.client import HttpClient
from llm_api_server.http_client.response import BrokenResponse, NoResponse

MAX_URL_CHARS = 8192
#: Concurrent fetches of a worker, so that it is no tool to flood other servers with.
MAX_CONCURRENT = 16
_HTTPS = 443
_OK = 200
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
#: Characters that RFC 3986 allows in a URL. Parsers disagree about any other.
_URL = re.compile(r"https://[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]+", re.ASCII | re.IGNORECASE)
_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9]([a-z0-9._-]*[a-z0-9.])?)(:\d{1,5})?", re.ASCII | re.IGNORECASE)
_TYPES = {
    b"\x89PNG": "image/png",
    b"\xff\xd8": "image/jpeg",
    b"GIF8": "image/gif",
    b"RIFF": "image/webp",
    b"BM": "image/bmp",
}
_HEADERS = {"accept": "image/*", "user-agent": "llm-api-server", "connection": "close"}

ResolveName = Callable[[str, int], Awaitable[Sequence[str]]]


class _Refused(Exception):
    """A URL is not fetched; the message is for the client."""


class MediaFetcher:
    """Fetcher of one worker. `resolve` returns a name's numeric addresses, `may_connect` judges each of them."""

    def __init__(
        self,
        config: MediaConfig,
        *,
        resolve: ResolveName | None = None,
        may_connect: Callable[[str], bool] = is_public,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._config = config
        self._resolve = resolve or _resolve
        self._may_connect = may_connect
        self._tls = tls
        self._slots = asyncio.Semaphore(MAX_CONCURRENT)

    @property
    def is_on(self) -> bool:
        return bool(self._config.hosts)

    async def fetch(self, url: str, param: str) -> str:
        """Return the image as a data: URL. Raises `InvalidRequest`."""
        try:
            async with asyncio.timeout(self._config.timeout), self._slots:
                content = await self._follow(url)
        except TimeoutError:
            reason = f"The image could not be fetched within {self._config.timeout:g} seconds."
        except _Refused as refused:
            reason = str(refused)
        except BrokenResponse:
            reason = "The image could not be fetched: its server sent a broken response."
        except (NoResponse, ValueError):
            reason = "The image could not be fetched."
        else:
            return f"data:{_type_of(content)};base64,{base64.b64encode(content).decode()}"
        raise InvalidRequest(reason, param=param)

    async def _follow(self, url: str) -> bytes:
        for _ in range(self._config.max_redirects + 1):
            status, location, content = await self._get(*self._target(url))
            if status in _REDIRECTS and location is not None:
                url = urljoin(url, location)
                continue
            if status != _OK:
                raise _Refused(f"The image could not be fetched: its server responded with status {status}.")
            _check_image(content)
            return content
        raise _Refused(f"The image could not be fetched: more than {self._config.max_redirects} redirects.")

    def _target(self, url: str) -> tuple[str, str]:
        """Return address and path of a URL that may be fetched. Raises `_Refused`."""
        if len(url) > MAX_URL_CHARS or not _URL.fullmatch(url):
            raise _Refused("Only https: URLs of images can be fetched.")
        try:
            parts = urlsplit(url)
            port = parts.port or _HTTPS
        except ValueError:
            raise _Refused("The URL of the image is not valid.") from None
        if not _AUTHORITY.fullmatch(parts.netloc):  # no user and password either
            raise _Refused("The URL of the image must have a plain host name, and no user name or password.")
        host = (parts.hostname or "").rstrip(".")
        shown = host if port == _HTTPS else f"{host}:{port}"
        if not any(fnmatchcase(shown, pattern.lower()) for pattern in self._config.hosts):
            raise _Refused(f"Images from the host '{shown[:256]}' may not be fetched (media.hosts).")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}", path

    async def _get(self, address: str, path: str) -> tuple[int, str | None, bytes]:
        """Return status, `location` and body, over a connection of its own."""
        self._tls = self._tls or ssl.create_default_context()
        limit = self._config.max_bytes
        client = HttpClient(resolve=self._checked_address, tls=self._tls, connect_timeout=self._config.timeout)
        try:
            response = await client.request("GET", address, path, headers=_HEADERS)
            content = await response.read_all(limit + 1)
        finally:
            client.close()
        if len(content) > limit:
            raise _Refused(f"The image is larger than the {limit} bytes that are allowed.")
        return response.status, response.headers.get("location"), content

    async def _checked_address(self, address: Address) -> str:
        """Resolve the name and return the address to connect to. Raises `_Refused` unless all of them are public."""
        addresses = await self._resolve(address.host, address.port)
        if not addresses or not all(map(self._may_connect, addresses)):
            raise _Refused("The image could not be fetched: its host has no public address.")
        return addresses[0]


def _check_image(content: bytes) -> None:
    try:
        size = read_size(content)
    except BrokenImage:
        raise _Refused("The fetched image is damaged or cut off: its size cannot be read.") from None
    if size is None:
        raise _Refused("The fetched file is not a PNG, JPEG, GIF, WebP or BMP image.")


def _type_of(content: bytes) -> str:
    return next(name for start, name in _TYPES.items() if content.startswith(start))


async def _resolve(host: str, port: int) -> Sequence[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]

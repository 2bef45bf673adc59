"""Fetches pictures that requests name by URL, from hosts that the configuration allows and from nowhere inside.

Engines never fetch. A name is resolved once and the connection goes to the address that was looked at, so a name that
changes its mind reaches nothing; every redirect is a new URL with all checks. What comes is cut off at a size and a
time, and must be a picture by its own bytes.
"""

from __future__ import annotations

import asyncio
import base64
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from urllib.parse import urljoin, urlsplit

import httptools

from llm_api_server.config.models import MediaConfig
from llm_api_server.errors import InvalidRequest
from llm_api_server.gateway.media.image_size import BrokenPicture, read_size
from llm_api_server.gateway.media.public_addresses import is_public

MAX_URL_CHARS = 8192
MAX_HEAD_BYTES = 64 * 1024
#: Fetched at once by a worker: it is no tool to flood others with.
MAX_AT_ONCE = 16
_HTTPS = 443
_OK = 200
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_READ_BYTES = 64 * 1024
#: What RFC 3986 allows in a URL. Whatever else is in one, parsers disagree about.
_URL = re.compile(r"https://[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]+", re.ASCII | re.IGNORECASE)
_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9]([a-z0-9._-]*[a-z0-9.])?)(:\d{1,5})?", re.ASCII | re.IGNORECASE)
_TYPES = {
    b"\x89PNG": "image/png",
    b"\xff\xd8": "image/jpeg",
    b"GIF8": "image/gif",
    b"RIFF": "image/webp",
    b"BM": "image/bmp",
}

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


@dataclass(frozen=True)
class _Target:
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _HTTPS else f"{host}:{self.port}"


class _Refused(Exception):
    """Why a URL is not fetched, in words for the client."""


class MediaFetcher:
    """One per worker. `resolve` gives a name's numeric addresses, `may_connect` judges them, `tls` checks hosts."""

    def __init__(
        self,
        config: MediaConfig,
        *,
        resolve: Resolve | None = None,
        may_connect: Callable[[str], bool] = is_public,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._config = config
        self._resolve = resolve or _resolve
        self._may_connect = may_connect
        self._tls = tls
        self._places = asyncio.Semaphore(MAX_AT_ONCE)

    @property
    def is_on(self) -> bool:
        return bool(self._config.hosts)

    async def fetch(self, url: str, param: str) -> str:
        """The picture as a data: URL. Raises `InvalidRequest`."""
        try:
            async with asyncio.timeout(self._config.timeout), self._places:
                content = await self._follow(url)
        except TimeoutError:
            reason = f"The image could not be fetched within {self._config.timeout:g} seconds."
        except _Refused as refused:
            reason = str(refused)
        except (OSError, ValueError, httptools.HttpParserError, httptools.HttpParserUpgrade):
            reason = "The image could not be fetched."
        else:
            return f"data:{_type_of(content)};base64,{base64.b64encode(content).decode()}"
        raise InvalidRequest(reason, param=param)

    async def _follow(self, url: str) -> bytes:
        for _ in range(self._config.max_redirects + 1):
            answer = await self._get(self._target(url))
            if answer.status in _REDIRECTS and answer.location is not None:
                url = urljoin(url, answer.location)
                continue
            if answer.status != _OK:
                raise _Refused(f"The image could not be fetched: its server answered with status {answer.status}.")
            return _checked(bytes(answer.body))
        raise _Refused(f"The image could not be fetched: more than {self._config.max_redirects} redirects.")

    def _target(self, url: str) -> _Target:
        """Where a URL leads, if it may be fetched. Raises `_Refused`."""
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
        return _Target(host, port, path)

    async def _get(self, target: _Target) -> _MediaResponse:
        addresses = await self._resolve(target.host, target.port)
        if not addresses or not all(map(self._may_connect, addresses)):
            raise _Refused("The image could not be fetched: its host has no public address.")
        tls = self._tls = self._tls or ssl.create_default_context()
        reader, writer = await asyncio.open_connection(
            addresses[0], target.port, ssl=tls, server_hostname=target.host, limit=_READ_BYTES
        )
        try:
            writer.write(
                f"GET {target.path} HTTP/1.1\r\nhost: {target.authority}\r\naccept: image/*\r\n"
                "accept-encoding: identity\r\nuser-agent: llm-api-server\r\nconnection: close\r\n\r\n".encode("ascii")
            )
            answer = _MediaResponse(self._config.max_bytes)
            while not answer.is_complete and (data := await reader.read(_READ_BYTES)):
                answer.feed(data)
            if not answer.is_complete and not answer.ends_at_close:
                raise _Refused("The image could not be fetched: its server broke off.")
            return answer
        finally:
            writer.transport.abort()


class _MediaResponse:
    """One response as it is read; callbacks of httptools."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._parser = httptools.HttpResponseParser(self)
        self._head_bytes = 0
        self._has_length = False
        self.status = 0
        self.location: str | None = None
        self.body = bytearray()
        self.is_complete = False

    @property
    def ends_at_close(self) -> bool:
        """Without a length and without chunks the end of the connection is that of the body."""
        return self.status != 0 and not self._has_length

    def feed(self, data: bytes) -> None:
        """Raises `_Refused` when it is too much."""
        if not self.status:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                raise _Refused("The image could not be fetched: the head of its server's answer is too long.")
        self._parser.feed_data(data)
        if len(self.body) > self._max_bytes:
            raise _Refused(f"The image is larger than the {self._max_bytes} bytes that are allowed.")
        # A body that is not wanted need not be waited for.
        self.is_complete = self.is_complete or (self.status not in (0, _OK))

    def on_header(self, name: bytes, value: bytes) -> None:
        match name.lower():
            case b"location":
                self.location = value.decode("latin-1")
            case b"content-length" | b"transfer-encoding":
                self._has_length = True

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.is_complete = True


def _checked(content: bytes) -> bytes:
    try:
        size = read_size(content)
    except BrokenPicture:
        raise _Refused("What was fetched is damaged or cut off: its size cannot be read.") from None
    if size is None:
        raise _Refused("What was fetched is not a PNG, JPEG, GIF, WebP or BMP image.")
    return content


def _type_of(content: bytes) -> str:
    return next(name for start, name in _TYPES.items() if content.startswith(start))


async def _resolve(host: str, port: int) -> Sequence[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]

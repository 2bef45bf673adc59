"""HTTP/1.1 client for engines: unix sockets, TCP and TLS, keep-alive connections pooled per address.

Used by `proxy.py` and `context.py` on the worker's event loop. Per response there is one waiter and no task or timer;
`read` returns everything that has arrived since the last call, so that a client's bytes take one write per read.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import httptools

HIGH_WATER_BYTES = 64 * 1024
MAX_HEAD_BYTES = 64 * 1024
MAX_IDLE_CONNECTIONS = 64
#: Engines (uvicorn, llama.cpp's cpp-httplib) close idle connections after 5 s; older ones are not worth the try.
IDLE_TIMEOUT = 4.0
CONNECT_TIMEOUT = 10.0


class UpstreamError(Exception):
    """Talking to an engine failed. The message is for the log."""


class NoResponse(UpstreamError):
    """Nothing of an answer arrived: it could not connect, or the engine closed the connection first."""


class BrokenResponse(UpstreamError):
    """The answer stopped in the middle or was not HTTP."""


@dataclass(frozen=True)
class Address:
    """`unix:/path` or `http(s)://host[:port][/prefix]`, taken apart."""

    host: str
    port: int = 0
    socket_path: str | None = None
    tls: bool = False
    prefix: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        if text.startswith("unix:"):
            return cls(host="localhost", socket_path=text.removeprefix("unix:"))
        url = urlsplit(text)
        tls = url.scheme == "https"
        return cls(url.hostname or "", url.port or (443 if tls else 80), None, tls, url.path.rstrip("/"))

    @property
    def host_header(self) -> str:
        if self.socket_path is not None or self.port == (443 if self.tls else 80):
            return self.host
        return f"{self.host}:{self.port}"

    def target(self, path: str) -> str:
        """`path` under the prefix; a prefix that ends in `/v1`, as OpenAI base URLs do, is not doubled."""
        if self.prefix.endswith("/v1") and path.startswith("/v1/"):
            path = path.removeprefix("/v1")
        return self.prefix + path


class Response:
    """One answer of an engine. `headers` have lower-case names."""

    def __init__(self, connection: _Connection) -> None:
        self._connection: _Connection | None = connection
        self._chunks: list[bytes] = []
        self._buffered = 0
        self._complete = False
        self._error: UpstreamError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.status = 0
        self.headers: dict[str, str] = {}
        self.has_head = False

    async def read(self) -> bytes:
        """All body bytes that have arrived, waiting for some; b"" at the end. Raises `BrokenResponse`."""
        while not self._chunks:
            if self._complete:
                return b""
            if self._error is not None:
                raise self._error
            await self._wait()
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._buffered = 0
        if self._connection is not None:
            self._connection.resume()
        return data

    async def read_all(self, limit: int) -> bytes:
        """The whole body, cut off (and the connection closed) after `limit` bytes."""
        body = bytearray()
        while len(body) < limit and (data := await self.read()):
            body += data
        if len(body) >= limit:
            self.abort()
        return bytes(body[:limit])

    def abort(self) -> None:
        """Close the connection unless the answer is complete. An engine that sees it stops generating."""
        if self._connection is not None and not self._complete:
            self._connection.abort()

    async def _wait_head(self) -> None:
        while not self.has_head:
            if self._error is not None:
                raise self._error
            await self._wait()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def on_head(self, status: int, headers: dict[str, str]) -> None:
        self.status, self.headers, self.has_head = status, headers, True
        self._wake()

    def on_body(self, data: bytes) -> int:
        """Keep `data`; returns how much waits to be read."""
        self._chunks.append(data)
        self._buffered += len(data)
        self._wake()
        return self._buffered

    def on_complete(self) -> None:
        self._complete = True
        self._connection = None
        self._wake()

    def on_error(self, error: UpstreamError) -> None:
        self._error = error
        self._connection = None
        self._wake()


class _Connection(asyncio.Protocol):
    """One socket: writes a request, parses its answer into a `Response`, goes back to its pool."""

    def __init__(self, pool: _Pool) -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._response: Response | None = None
        self._headers: dict[str, str] = {}
        self._head_bytes = 0
        self._got_bytes = False
        self._is_paused = False
        self.idle_since = 0.0
        self.is_reused = False

    # ── asyncio.Protocol ──

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        plain = transport.get_extra_info("socket")
        if plain is not None and plain.family != socket.AF_UNIX:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        response = self._response
        if response is None:
            self.abort()  # bytes that nobody asked for: the connection cannot be trusted any more
            return
        self._got_bytes = True
        if not response.has_head:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(BrokenResponse(f"the engine's answer is not HTTP: {error}"))
            return
        if self._head_bytes > MAX_HEAD_BYTES and not response.has_head:
            self._fail(BrokenResponse("the head of the engine's answer is too long"))

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.forget(self)
        self._transport = None
        if self._response is None:
            return
        if self._ends_at_close():
            self._response.on_complete()
            self._response = None
        elif not self._got_bytes:
            self._fail(NoResponse(f"the engine closed the connection without an answer ({exc or 'end of stream'})"))
        else:
            self._fail(BrokenResponse(f"the engine closed the connection in mid-answer ({exc or 'end of stream'})"))

    # ── httptools callbacks ──

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= 200 and self._response is not None:  # noqa: PLR2004 - 1xx announce, they do not answer
            self._response.on_head(status, self._headers)
        self._headers = {}

    def on_body(self, data: bytes) -> None:
        response = self._response
        if response is not None and response.on_body(data) > HIGH_WATER_BYTES:
            self._pause()

    def on_message_complete(self) -> None:
        response = self._response
        if response is None or not response.has_head:
            return
        self._response = None
        response.on_complete()
        if self._parser.should_keep_alive():
            self.resume()
            self._pool.give_back(self)
        else:
            self.abort()

    # ── for the pool and the response ──

    def start(self, request: bytes) -> Response:
        """Send one request. The connection is new or idle."""
        assert self._transport is not None
        self._response = Response(self)
        self._got_bytes = False
        self._head_bytes = 0
        self._transport.write(request)
        return self._response

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def resume(self) -> None:
        if self._is_paused and self._transport is not None:
            self._is_paused = False
            self._transport.resume_reading()

    def abort(self) -> None:
        self._pool.forget(self)
        if self._transport is not None:
            self._transport.abort()

    def _pause(self) -> None:
        if not self._is_paused and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()

    def _ends_at_close(self) -> bool:
        """Without a length and without chunks the end of the connection is the end of the body (RFC 9112, 6.3)."""
        response = self._response
        if response is None or not response.has_head:
            return False
        return "content-length" not in response.headers and "transfer-encoding" not in response.headers

    def _fail(self, error: UpstreamError) -> None:
        response, self._response = self._response, None
        if response is not None:
            response.on_error(error)
        self.abort()


class _Pool:
    """The connections to one address; the one used last is used first."""

    def __init__(self, address: Address, tls: ssl.SSLContext | None) -> None:
        self._address = address
        self._tls = tls
        self._idle: list[_Connection] = []
        self._all: set[_Connection] = set()
        self._connecting = 0

    def take_idle(self) -> _Connection | None:
        now = asyncio.get_running_loop().time()
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open and now - connection.idle_since < IDLE_TIMEOUT:
                connection.is_reused = True
                return connection
            connection.abort()
        return None

    async def connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        address = self._address
        self._connecting += 1
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                if address.socket_path is not None:
                    _, connection = await loop.create_unix_connection(lambda: _Connection(self), address.socket_path)
                else:
                    _, connection = await loop.create_connection(
                        lambda: _Connection(self), address.host, address.port, ssl=self._tls
                    )
        except OSError as error:  # TimeoutError is one, without a text
            raise NoResponse(f"cannot connect to the engine: {str(error) or 'timed out'}") from error
        finally:
            self._connecting -= 1
        self._all.add(connection)
        return connection

    def give_back(self, connection: _Connection) -> None:
        if len(self._idle) >= MAX_IDLE_CONNECTIONS:
            connection.abort()
            return
        connection.idle_since = asyncio.get_running_loop().time()
        self._idle.append(connection)

    def forget(self, connection: _Connection) -> None:
        self._all.discard(connection)
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)

    @property
    def is_unused(self) -> bool:
        return not self._all and not self._connecting

    def close(self) -> None:
        for connection in list(self._all):
            connection.abort()


class UpstreamClient:
    """All connections of a worker to its engines."""

    def __init__(self) -> None:
        self._pools: dict[str, _Pool] = {}
        self._tls: ssl.SSLContext | None = None

    async def post(
        self, address_text: str, path: str, body: bytes, *, content_type: str, headers: Mapping[str, str]
    ) -> Response:
        """Send `body` and wait for the head of the answer.

        A pooled connection that the engine had closed meanwhile is replaced by a fresh one, once. Raises `NoResponse`
        when nothing of an answer came, `BrokenResponse` when it was broken.
        """
        address = Address.parse(address_text)
        request = _encode_request(address, path, body, content_type, headers)
        pool = self._pool(address_text, address)
        connection = pool.take_idle() or await pool.connect()
        try:
            return await _exchange(connection, request)
        except NoResponse:
            if not connection.is_reused:
                raise
        return await _exchange(await pool.connect(), request)

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()

    def _pool(self, key: str, address: Address) -> _Pool:
        pool = self._pools.get(key)
        if pool is None:
            # Every load of a model has a socket of its own; the pools of those that are gone go with the next new one.
            self._pools = {name: one for name, one in self._pools.items() if not one.is_unused}
            if address.tls and self._tls is None:
                self._tls = ssl.create_default_context()
            pool = self._pools[key] = _Pool(address, self._tls if address.tls else None)
        return pool


async def _exchange(connection: _Connection, request: bytes) -> Response:
    response = connection.start(request)
    try:
        await response._wait_head()  # noqa: SLF001 - the two classes are one mechanism
    except asyncio.CancelledError:
        response.abort()
        raise
    return response


def _encode_request(address: Address, path: str, body: bytes, content_type: str, headers: Mapping[str, str]) -> bytes:
    lines = [
        f"POST {address.target(path)} HTTP/1.1",
        f"host: {address.host_header}",
        f"content-type: {content_type}",
        f"content-length: {len(body)}",
        "accept-encoding: identity",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body

"""HTTP/1.1 client for engines: unix sockets, TCP and TLS, keep-alive connections pooled per address.

Used on the worker's event loop. Whoever asks is called with what has arrived, once per read of the socket (`Receiver`:
no task, future or timer per read), or waits for it (`Response`).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import Mapping
from typing import Protocol

import httptools

from llm_api_server.event_loop.eager_task import ensure_task
from llm_api_server.event_loop.write_buffer import WriteBuffer
from llm_api_server.http_client import fast_parse
from llm_api_server.http_client.address import Address, encode_request, parse_address

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


class Receiver(Protocol):
    """Gets an answer, on the event loop. After the last data or an error nothing more comes."""

    def on_head(self, status: int, headers: dict[str, str]) -> None:
        """`headers` have lower-case names."""

    def on_data(self, data: bytes, *, is_last: bool) -> None:
        """What one read of the socket brought of the body, perhaps nothing."""

    def on_frames(self, frames: bytes) -> bool:
        """Part of the body, not the last, as it came. False: what is in the frames is wanted, by `on_data`."""

    def on_error(self, error: UpstreamError) -> None: ...


class Response:
    """One answer of an engine for those who wait for it. `headers` have lower-case names."""

    def __init__(self) -> None:
        self._connection: Connection | None = None
        self._chunks: list[bytes] = []
        self._buffered = 0
        self._is_complete = False
        self._error: UpstreamError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.status = 0
        self.headers: dict[str, str] = {}

    async def read(self) -> bytes:
        """All body bytes that have arrived, waiting for some; b"" at the end. Raises `BrokenResponse`."""
        while not self._chunks:
            if self._is_complete:
                return b""
            if self._error is not None:
                raise self._error
            await self._wait()
        data = b"".join(self._chunks)
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
        if self._connection is not None:
            self._connection.abort()

    async def wait_head(self, connection: Connection) -> None:
        self._connection = None if self._is_complete else connection
        while not self.status:
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
        self.status, self.headers = status, headers
        self._wake()

    def on_data(self, data: bytes, *, is_last: bool) -> None:
        if data:
            self._chunks.append(data)
            self._buffered += len(data)
        if is_last:
            self._is_complete = True
            self._connection = None
        elif self._buffered > HIGH_WATER_BYTES and self._connection is not None:
            self._connection.pause()
        self._wake()

    def on_frames(self, frames: bytes) -> bool:  # noqa: ARG002 - it takes none
        return False

    def on_error(self, error: UpstreamError) -> None:
        self._error = error
        self._connection = None
        self._wake()


class Connection(asyncio.Protocol):
    """One socket: writes a request, parses its answer for a `Receiver`, goes back to its pool."""

    def __init__(self, pool: _Pool) -> None:
        self._pool = pool
        self.transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._receiver: Receiver | None = None
        self._headers: dict[str, str] = {}
        self._chunks: list[bytes] = []
        self._head_bytes = 0
        self._has_head = False
        #: That of a body in frames which the parser knows nothing of: all its frames so far were ordinary and whole.
        self._unparsed_head = b""
        self._has_end = False
        self._stays_open = False
        self._ends_at_close = False
        self._is_paused = False
        self.idle_since = 0.0
        self.is_reused = False

    # ── asyncio.Protocol ──

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = self._pool.turns.wrap(transport)
        plain = transport.get_extra_info("socket")
        if plain is not None and plain.family != socket.AF_UNIX:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        receiver = self._receiver
        if receiver is None:
            self.abort()  # bytes that nobody asked for: the connection cannot be trusted any more
            return
        if self._unparsed_head:
            if self._read_frames(data, receiver):
                return
            data, self._unparsed_head = self._unparsed_head + data, b""
        elif not self._has_head:
            if not self._head_bytes and self._read_ordinary(data, receiver):
                return
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(BrokenResponse(f"the engine's answer is not HTTP: {error}"))
            return
        if self._has_end:
            self._deliver_end(receiver)
        elif self._chunks:
            receiver.on_data(self._take(), is_last=False)
        elif self._head_bytes > MAX_HEAD_BYTES and not self._has_head:
            self._fail(BrokenResponse("the head of the engine's answer is too long"))

    def _read_ordinary(self, data: bytes, receiver: Receiver) -> bool:
        """The usual JSON answer, all of it in one read, and the beginning of the usual stream.

        The receiver gets type and length only of its headers. Whatever has more to it is left to the parser.
        """
        end = data.find(b"\r\n\r\n")
        if end < 0:
            return False
        length, headers = fast_parse.read_head(data[: end + 2])
        if length == fast_parse.IN_FRAMES:
            self._unparsed_head = data[: end + 4]
            self._head_bytes, self._has_head, self._ends_at_close = end + 4, True, False
            receiver.on_head(200, headers)
            if len(data) > end + 4:
                self.data_received(data[end + 4 :])
            return True
        if length != len(data) - end - 4:
            return False
        self._receiver = None
        self._pool.give_back(self)
        receiver.on_head(200, headers)
        receiver.on_data(data[end + 4 :], is_last=True)
        return True

    def _read_frames(self, data: bytes, receiver: Receiver) -> bool:
        """Some frames, all of them whole, the last of the body perhaps among them; others are left to the parser."""
        start = fast_parse.start_in_frame(data)
        if start:  # one frame: nearly all of a stream
            if not receiver.on_frames(data):
                receiver.on_data(data[start:-2], is_last=False)
            return True
        payloads = fast_parse.whole_frames(data)
        if payloads is None:
            return False
        if payloads[-1]:
            if not receiver.on_frames(data):
                receiver.on_data(b"".join(payloads), is_last=False)
            return True
        self._unparsed_head = b""
        self._receiver = None
        self.resume()
        self._pool.give_back(self)
        receiver.on_data(b"".join(payloads), is_last=True)
        return True

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.forget(self)
        self.transport = None
        receiver = self._receiver
        if receiver is None:
            return
        reason = exc or "end of stream"
        if self._has_head and self._ends_at_close:
            self._receiver = None
            receiver.on_data(b"", is_last=True)
        elif not self._head_bytes:
            self._fail(NoResponse(f"the engine closed the connection without an answer ({reason})"))
        else:
            self._fail(BrokenResponse(f"the engine closed the connection in mid-answer ({reason})"))

    # ── httptools callbacks ──

    def on_message_begin(self) -> None:
        if self._has_end:
            self._stays_open = False  # bytes that nobody asked for

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        headers, self._headers = self._headers, {}
        if status >= 200 and self._receiver is not None and not self._has_head:  # noqa: PLR2004 - 1xx announce, they do not answer
            self._has_head = True
            # Without a length and without chunks the end of the connection is that of the body (RFC 9112, 6.3).
            self._ends_at_close = "content-length" not in headers and "transfer-encoding" not in headers
            self._receiver.on_head(status, headers)

    def on_body(self, data: bytes) -> None:
        if not self._has_end:
            self._chunks.append(data)

    def on_message_complete(self) -> None:
        if not self._has_head or self._has_end:
            return
        self._has_end = True
        self._stays_open = self._parser.should_keep_alive()  # the parser knows only now

    # ── for the pool and the receiver ──

    def start(self, request: bytes, receiver: Receiver) -> None:
        """Send one request. The connection is new or idle."""
        assert self.transport is not None
        self._receiver = receiver
        self._head_bytes = 0
        self._has_head = self._has_end = False
        self._unparsed_head = b""
        self.transport.write(request)

    def pause(self) -> None:
        """Read no more for now: the engine will feel it."""
        if not self._is_paused and self.transport is not None:
            self._is_paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        if self._is_paused and self.transport is not None:
            self._is_paused = False
            self.transport.resume_reading()

    def abort(self) -> None:
        """Close it; an engine that sees it stops generating. The receiver hears nothing more."""
        self._receiver = None
        self._pool.forget(self)
        if self.transport is not None:
            self.transport.abort()

    def abort_for(self, receiver: Receiver) -> None:
        """`abort`, unless the connection has other work by now."""
        if self._receiver is receiver:
            self.abort()

    def _take(self) -> bytes:
        chunks = self._chunks
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        return data

    def _deliver_end(self, receiver: Receiver) -> None:
        self._receiver = None
        data = self._take()
        if self._stays_open:
            self.resume()
            self._pool.give_back(self)
        else:
            self.abort()
        receiver.on_data(data, is_last=True)

    def _fail(self, error: UpstreamError) -> None:
        receiver = self._receiver
        self.abort()
        if receiver is not None:
            receiver.on_error(error)


class _Pool:
    """The connections to one address; the one used last is used first."""

    def __init__(self, address: Address, tls: ssl.SSLContext | None, turns: WriteBuffer) -> None:
        self.turns = turns
        self._address = address
        self._tls = tls
        self._idle: list[Connection] = []
        self._all: set[Connection] = set()
        self._connecting = 0

    def take_idle(self) -> Connection | None:
        now = time.monotonic()
        while self._idle:
            connection = self._idle.pop()
            transport = connection.transport
            if now - connection.idle_since < IDLE_TIMEOUT and transport is not None and not transport.is_closing():
                connection.is_reused = True
                return connection
            connection.abort()
        return None

    async def connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        address = self._address
        self._connecting += 1
        try:
            await ensure_task()
            async with asyncio.timeout(CONNECT_TIMEOUT):
                if address.socket_path is not None:
                    _, connection = await loop.create_unix_connection(lambda: Connection(self), address.socket_path)
                else:
                    _, connection = await loop.create_connection(
                        lambda: Connection(self), address.host, address.port, ssl=self._tls
                    )
        except OSError as error:  # TimeoutError is one, without a text
            raise NoResponse(f"cannot connect to the engine: {str(error) or 'timed out'}") from error
        finally:
            self._connecting -= 1
        self._all.add(connection)
        return connection

    def give_back(self, connection: Connection) -> None:
        if len(self._idle) >= MAX_IDLE_CONNECTIONS:
            connection.abort()
            return
        connection.idle_since = time.monotonic()
        self._idle.append(connection)

    def forget(self, connection: Connection) -> None:
        self._all.discard(connection)
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)

    @property
    def is_unused(self) -> bool:
        return not self._all and not self._connecting

    def close(self) -> None:
        for connection in list(self._all):
            connection.abort()


class HttpClient:
    """All connections of a worker to its engines."""

    def __init__(self) -> None:
        self.turns = WriteBuffer()
        self._pools: dict[str, _Pool] = {}
        self._tls: ssl.SSLContext | None = None

    async def send(
        self, address_text: str, request: bytes, receiver: Receiver, *, is_fresh: bool = False
    ) -> Connection:
        """Write one request (`encode_request`), over a connection that is idle unless it must be `is_fresh`.

        A connection that says `is_reused` may fail with `NoResponse` because the engine had closed it meanwhile: then
        ask again for a fresh one. Raises `NoResponse` when it cannot connect.
        """
        if not is_fresh and (idle := self.send_at_once(address_text, request, receiver)) is not None:
            return idle
        connection = await self._pool(address_text).connect()
        connection.start(request, receiver)
        return connection

    def send_at_once(self, address_text: str, request: bytes, receiver: Receiver) -> Connection | None:
        """`send` over an idle connection, where there is one."""
        pool = self._pools.get(address_text)
        connection = pool.take_idle() if pool is not None else None
        if connection is not None:
            connection.start(request, receiver)
        return connection

    async def post(
        self, address: str, path: str, body: bytes, *, content_type: str, headers: Mapping[str, str]
    ) -> Response:
        """Send `body` and wait for the head of the answer.

        A pooled connection that the engine had closed meanwhile is replaced by a fresh one, once. Raises `NoResponse`
        when nothing of an answer came, `BrokenResponse` when it was broken.
        """
        request = encode_request(address, path, body, content_type=content_type, headers=headers)
        response = Response()
        connection = await self.send(address, request, response)
        try:
            try:
                await response.wait_head(connection)
            except NoResponse:
                if not connection.is_reused:
                    raise
                response = Response()
                connection = await self.send(address, request, response, is_fresh=True)
                await response.wait_head(connection)
        except asyncio.CancelledError:
            connection.abort()
            raise
        return response

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()

    def _pool(self, key: str) -> _Pool:
        if (known := self._pools.get(key)) is not None:
            return known
        # Every load of a model has a socket of its own; the pools of those that are gone go with the next new one.
        self._pools = {name: one for name, one in self._pools.items() if not one.is_unused}
        address = parse_address(key)
        if address.tls and self._tls is None:
            self._tls = ssl.create_default_context()
        pool = self._pools[key] = _Pool(address, self._tls if address.tls else None, self.turns)
        return pool

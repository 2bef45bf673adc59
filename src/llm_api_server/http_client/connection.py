"""Connections of the HTTP/1.1 client, with one request at a time each, and their pool per address.

A `Receiver` is called once per read of the socket: no task, future or timer per read. On the event loop of its process.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import Awaitable, Callable

import httptools

from llm_api_server.event_loop.eager_task import ensure_task
from llm_api_server.event_loop.write_buffer import WriteBuffer
from llm_api_server.http_client import fast_parse
from llm_api_server.http_client.address import Address
from llm_api_server.http_client.content_coding import CodingError, Decoder, decoder_for, is_identity
from llm_api_server.http_client.response import BrokenResponse, NoResponse, Receiver, UpstreamError

MAX_HEAD_BYTES = 64 * 1024
MAX_IDLE_CONNECTIONS = 64
#: Seconds. Engines (uvicorn, llama.cpp's cpp-httplib) close idle connections after 5 s.
IDLE_TIMEOUT = 4.0
CONNECT_TIMEOUT = 10.0

#: Returns the numeric address to connect to, or raises to refuse it.
Resolve = Callable[[Address], Awaitable[str]]


class Connection(asyncio.Protocol):
    """HTTP connection that sends a request, parses the response for a `Receiver` and returns to its pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._receiver: Receiver | None = None
        self._headers: dict[str, str] = {}
        self._pieces: list[bytes] = []
        #: Decoder of a compressed body.
        self._decoder: Decoder | None = None
        self._head_bytes = 0
        self._has_head = False
        #: Head of a chunked response that the parser has not seen, because all its chunks so far arrived whole.
        self._unparsed_head = b""
        self._has_end = False
        self._stays_open = False
        self._ends_at_close = False
        self._is_paused = False
        self.idle_since = 0.0
        self.is_reused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = self._pool.write_buffer.wrap(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        receiver = self._receiver
        if receiver is None:
            self.abort()  # bytes without a request: a response smuggled in front of the next one
            return
        if self._unparsed_head:
            if self._read_chunks(data, receiver):
                return
            data, self._unparsed_head = self._unparsed_head + data, b""
        elif not self._has_head:
            if not self._head_bytes and self._read_usual(data, receiver):
                return
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(BrokenResponse(f"the response is not HTTP: {error.__context__ or error}"))
            return
        if self._has_end:
            self._deliver_end(receiver)
        elif self._pieces:
            receiver.on_data(self._take(), is_last=False)
        elif self._head_bytes > MAX_HEAD_BYTES and not self._has_head:
            self._fail(BrokenResponse("the head of the response is too long"))

    def _read_usual(self, data: bytes, receiver: Receiver) -> bool:
        """Read a whole JSON response, or the beginning of a stream, of the usual form; return False for any other.

        Of such a response's headers the receiver gets only content type, length and transfer encoding.
        """
        end = data.find(b"\r\n\r\n")
        if end < 0:
            return False
        length, headers = fast_parse.read_head(data[: end + 2])
        if length == fast_parse.CHUNKED:
            self._unparsed_head = data[: end + 4]
            self._head_bytes, self._has_head, self._ends_at_close = end + 4, True, False
            receiver.on_head(200, headers)
            if len(data) > end + 4:
                self.data_received(data[end + 4 :])
            return True
        if length != len(data) - end - 4:
            return False
        self._receiver = None
        self._pool.release(self)
        receiver.on_head(200, headers)
        receiver.on_data(data[end + 4 :], is_last=True)
        return True

    def _read_chunks(self, data: bytes, receiver: Receiver) -> bool:
        """Read whole chunks, possibly up to the end of the body; return False for anything else."""
        start = fast_parse.payload_start(data)
        if start:  # one chunk: nearly every read of a stream
            if not receiver.on_chunks(data):
                receiver.on_data(data[start:-2], is_last=False)
            return True
        payloads = fast_parse.split_chunks(data)
        if payloads is None:
            return False
        if payloads[-1]:
            if not receiver.on_chunks(data):
                receiver.on_data(b"".join(payloads), is_last=False)
            return True
        self._unparsed_head = b""
        self._receiver = None
        self.resume()
        self._pool.release(self)
        receiver.on_data(b"".join(payloads), is_last=True)
        return True

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.discard(self)
        self.transport = None
        receiver = self._receiver
        if receiver is None:
            return
        reason = exc or "end of stream"
        if self._has_head and self._ends_at_close:
            try:
                if self._decoder is not None:
                    self._decoder.finish()
            except CodingError as error:
                self._fail(BrokenResponse(str(error)))
                return
            self._receiver = None
            receiver.on_data(b"", is_last=True)
        elif not self._head_bytes:
            self._fail(NoResponse(f"the connection was closed without a response ({reason})"))
        else:
            self._fail(BrokenResponse(f"the connection was closed in the middle of the response ({reason})"))

    def on_message_begin(self) -> None:
        if self._has_end:
            self._stays_open = False  # bytes after the end of the response

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        headers, self._headers = self._headers, {}
        if status >= 200 and self._receiver is not None and not self._has_head:  # noqa: PLR2004 - 1xx is no final response
            self._has_head = True
            # Without a length and without chunks the body ends with the connection (RFC 9112, section 6.3).
            self._ends_at_close = "content-length" not in headers and "transfer-encoding" not in headers
            if "content-encoding" in headers:
                self._choose_decoder(headers)
            self._receiver.on_head(status, headers)

    def _choose_decoder(self, headers: dict[str, str]) -> None:
        """Decode the body if its coding is known; the receiver gets the header of an unknown one."""
        coding = headers["content-encoding"]
        self._decoder = decoder_for(coding)
        if self._decoder is not None or is_identity(coding):
            del headers["content-encoding"]
        if self._decoder is not None:
            headers.pop("content-length", None)

    def on_body(self, data: bytes) -> None:
        if not self._has_end:
            self._pieces.append(data if self._decoder is None else self._decoder.decode(data))

    def on_message_complete(self) -> None:
        if not self._has_head or self._has_end:
            return
        self._has_end = True
        if self._decoder is not None:
            self._decoder.finish()
        self._stays_open = self._parser.should_keep_alive()  # unknown to the parser before

    def start(self, request: bytes, receiver: Receiver) -> None:
        """Send one request over this new or idle connection."""
        assert self.transport is not None
        self._receiver = receiver
        self._head_bytes = 0
        self._has_head = self._has_end = False
        self._unparsed_head = b""
        self._decoder = None
        self.transport.write(request)

    def pause(self) -> None:
        """Stop reading, so that the server's writes block."""
        if not self._is_paused and self.transport is not None:
            self._is_paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        if self._is_paused and self.transport is not None:
            self._is_paused = False
            self.transport.resume_reading()

    def abort(self) -> None:
        """Close the connection without another callback; an engine then stops generating."""
        self._receiver = None
        self._pool.discard(self)
        if self.transport is not None:
            self.transport.abort()

    def abort_for(self, receiver: Receiver) -> None:
        """Abort unless the connection serves another request by now."""
        if self._receiver is receiver:
            self.abort()

    def _take(self) -> bytes:
        pieces = self._pieces
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        return data

    def _deliver_end(self, receiver: Receiver) -> None:
        self._receiver = None
        data = self._take()
        if self._stays_open:
            self.resume()
            self._pool.release(self)
        else:
            self.abort()
        receiver.on_data(data, is_last=True)

    def _fail(self, error: UpstreamError) -> None:
        receiver = self._receiver
        self.abort()
        if receiver is not None:
            receiver.on_error(error)


class Pool:
    """Connections to one address. The most recently used one is reused first."""

    def __init__(
        self,
        address: Address,
        write_buffer: WriteBuffer,
        *,
        tls: ssl.SSLContext | None = None,
        resolve: Resolve | None = None,
        connect_timeout: float = CONNECT_TIMEOUT,
        idle_timeout: float = IDLE_TIMEOUT,
    ) -> None:
        self.write_buffer = write_buffer
        self._address = address
        self._tls = tls
        self._resolve = resolve
        self._connect_timeout = connect_timeout
        self._idle_timeout = idle_timeout
        self._idle: list[Connection] = []
        self._all: set[Connection] = set()
        self._connecting = 0

    def take_idle(self) -> Connection | None:
        now = time.monotonic()
        while self._idle:
            connection = self._idle.pop()
            transport = connection.transport
            if (
                now - connection.idle_since < self._idle_timeout
                and transport is not None
                and not transport.is_closing()
            ):
                connection.is_reused = True
                return connection
            connection.abort()
        return None

    async def connect(self) -> Connection:
        """Open a connection. Raises `NoResponse`, or what `resolve` raises."""
        self._connecting += 1
        try:
            await ensure_task()
            host = self._address.host if self._resolve is None else await self._resolve(self._address)
            async with asyncio.timeout(self._connect_timeout):
                connection = await self._open(host)
        except OSError as error:  # TimeoutError is one, without a text
            raise NoResponse(f"cannot connect: {str(error) or 'timed out'}") from error
        finally:
            self._connecting -= 1
        self._all.add(connection)
        return connection

    async def _open(self, host: str) -> Connection:
        loop, address = asyncio.get_running_loop(), self._address
        if address.socket_path is not None:
            return (await loop.create_unix_connection(lambda: Connection(self), address.socket_path))[1]
        server_hostname = address.host if self._tls is not None else None
        return (
            await loop.create_connection(
                lambda: Connection(self), host, address.port, ssl=self._tls, server_hostname=server_hostname
            )
        )[1]

    def release(self, connection: Connection) -> None:
        """Keep the connection for the next request."""
        if len(self._idle) >= MAX_IDLE_CONNECTIONS:
            connection.abort()
            return
        connection.idle_since = time.monotonic()
        self._idle.append(connection)

    def discard(self, connection: Connection) -> None:
        self._all.discard(connection)
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)

    @property
    def is_unused(self) -> bool:
        return not self._all and not self._connecting

    def close(self) -> None:
        for connection in list(self._all):
            connection.abort()

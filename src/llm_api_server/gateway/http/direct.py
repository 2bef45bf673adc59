"""Responder that reads and writes uvicorn's transport without ASGI."""

from __future__ import annotations

import asyncio
from typing import Protocol

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE
from uvicorn.server import ServerState

from llm_api_server.gateway.http.body_limit import body_stalled, body_too_large
from llm_api_server.gateway.http.request_head import RequestHead
from llm_api_server.gateway.http.responder import LAST_WRITE_TIMEOUT, RequestHandler, RequestListener


class ServerConnection(Protocol):
    """Connection to a client, as its responders see it."""

    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    flow: FlowControl
    client: tuple[str, int] | None
    server_state: ServerState

    def on_responder_closed(self, responder: DirectResponder) -> None:
        """A response is complete, or given up."""


class _UnusedEvent:
    """Stand-in for the event of uvicorn's request cycle."""

    def set(self) -> None:
        pass


_UNUSED_EVENT = _UnusedEvent()


class DirectResponder:
    """Request and response in the place of uvicorn's request cycle.

    uvicorn's protocol uses `response_complete`, `disconnected`, `keep_alive` and `message_event`.
    """

    __slots__ = (
        "_chunks", "_connection", "_handler", "_has_begun", "_has_turn", "_is_early", "_is_too_large", "_out",
        "_read_at", "_size", "_transport", "_waiter", "disconnected", "has_body", "head", "is_chunked", "keep_alive",
        "listener", "message_event", "response_complete",
    )  # fmt: skip

    def __init__(self, connection: ServerConnection, handler: RequestHandler, head: RequestHead) -> None:
        self._connection = connection
        self._handler = handler
        self.head = head
        self._transport = connection.transport
        self.keep_alive = head.keep_alive
        #: Set by the connection, as it refers to the responder.
        self.listener: RequestListener = None  # type: ignore[assignment]
        self.response_complete = False
        self.disconnected = False
        self.has_body = False
        self.is_chunked = False
        self.message_event = _UNUSED_EVENT
        self._chunks: list[bytes] = []
        self._size = 0
        #: When the body last made progress, while it is waited for.
        self._read_at = 0.0
        self._out: list[bytes] = []
        self._has_turn = False
        self._has_begun = False
        self._is_early = False
        self._is_too_large = False
        self._waiter: asyncio.Future[None] | None = None

    # From the connection.

    def begin_with(self, body: bytes) -> None:
        """Begin a request whose body is complete and that is next on its connection."""
        self._has_turn = self.has_body = self._has_begun = True
        self._is_too_large = len(body) > self._handler.max_body_bytes
        self._chunks.append(body)
        self.listener.register()
        self.listener.begin()

    def on_head(self) -> None:
        """Settle whether the response may precede the body."""
        length = self.head.headers.get(b"content-length", b"")
        self._is_too_large = self.has_body = length.isdigit() and int(length) > self._handler.max_body_bytes
        self._is_early = self._is_too_large or self.head.expects_continue

    def on_turn(self) -> None:
        """Begin: the earlier requests of this connection have their responses."""
        if self.disconnected:
            return
        self._has_turn = True
        self.listener.register()
        self._begin_if_ready()

    def on_body(self, data: bytes) -> None:
        if self.response_complete or self._is_too_large:
            return
        self._chunks.append(data)
        self._size += len(data)
        if self._waiter is not None:
            self._read_at = self._connection.loop.time()
        if self._size > self._handler.max_body_bytes:
            self._is_too_large = self.has_body = True
            self._chunks.clear()
            self._wake()

    def on_body_pending(self) -> None:
        """Begin, once it is the request's turn, before its body is complete: its key need not wait for that."""
        self._is_early = True
        self._begin_if_ready()

    def on_body_complete(self) -> None:
        self.has_body = True
        self._wake()
        self._begin_if_ready()

    def on_disconnect(self) -> None:
        self.disconnected = True
        self._has_begun = True  # or never will
        if not self.response_complete:
            self.listener.on_disconnect()

    def _begin_if_ready(self) -> None:
        if self._has_turn and not self._has_begun and (self.has_body or self._is_early):
            self._has_begun = True
            self.listener.begin()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # For the listener: `Responder`.

    @property
    def address(self) -> str | None:
        peer = self._connection.client
        return self._handler.client_address(peer[0] if peer else None, self.head.raw)

    @property
    def is_writable(self) -> bool:
        return not self._connection.flow.write_paused

    async def wait_body(self) -> None:
        if self.head.expects_continue:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        loop, timeout = self._connection.loop, self._handler.body_timeout
        self._read_at = loop.time()
        while not self.has_body:
            if loop.time() - self._read_at >= timeout:
                self.keep_alive = False  # the rest of the body would be read as the next request
                raise body_stalled(timeout)
            self._waiter = loop.create_future()
            timer = loop.call_at(self._read_at + timeout, self._wake)
            try:
                await self._waiter
            finally:
                timer.cancel()

    def take_body(self) -> bytes:
        if self._is_too_large:
            raise body_too_large(self._handler.max_body_bytes)
        chunks, self._chunks = self._chunks, []
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def start(self, status: int, lines: bytes) -> None:
        default_lines = self._handler.default_lines.of(self._connection.server_state.default_headers)
        out = [STATUS_LINE[status], default_lines, lines]
        if lines.find(b"content-length: ") < 0:
            if self.head.can_chunk:
                self.is_chunked = True
                out.append(b"transfer-encoding: chunked\r\n")
            else:
                self.keep_alive = False
        if not self.keep_alive:
            out.append(b"connection: close\r\n")
        out.append(b"\r\n")
        self._out = out

    def write(self, data: bytes) -> None:
        if self.is_chunked:
            self._out += (b"%x\r\n" % len(data), data, b"\r\n")
        else:
            self._out.append(data)

    def send(self, data: bytes) -> None:
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self.is_chunked else data)

    def forward(self, chunks: bytes) -> None:
        self._transport.write(chunks)

    def end(self) -> None:
        if self.is_chunked:
            self._out.append(b"0\r\n\r\n")
        self.response_complete = True
        if not self.disconnected:
            self._transport.write(b"".join(self._out))
        self._out = []

    def flush(self) -> None:
        out, self._out = self._out, []
        if out and not self.disconnected:
            self._transport.write(b"".join(out))

    def abort(self) -> None:
        self.keep_alive = False
        self.response_complete = True
        self.flush()

    def abort_if_stalled(self) -> None:
        self._connection.loop.call_later(LAST_WRITE_TIMEOUT, self._abort_if_blocked)

    def close(self) -> None:
        self.response_complete = True
        del self.listener  # breaks the cycle, which the garbage collector would have to find
        self._connection.on_responder_closed(self)

    def _abort_if_blocked(self) -> None:
        if not self.is_writable and not self._transport.is_closing():
            self._transport.abort()

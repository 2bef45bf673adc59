"""The client's end of a request, whichever server carries it: straight on a transport (`http_protocol.py`), or ASGI.

An exchange writes without waiting. It is told when the client does not read as fast, and when it leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Protocol

from starlette.types import Message, Receive, Send

from llm_api_server.errors import RequestTooLarge
from llm_api_server.gateway.http.request_head import headers_of

HIGH_WATER_BYTES = 64 * 1024
#: How long a client that has stopped reading is waited for with the last event.
FAREWELL_TIMEOUT = 1.0


class ClientGone(Exception):
    """The client closed its connection."""


class Listener(Protocol):
    """The exchange, as its client sees it."""

    def on_blocked(self) -> None:
        """More is written than the client reads."""

    def on_writable(self) -> None: ...

    def on_gone(self) -> None: ...

    def on_shutdown(self) -> None: ...


class Responder(Protocol):
    """`start`, any number of `write`, `end`; nothing of it waits, and it goes out with `flush`, `end` or `abort`."""

    @property
    def address(self) -> str | None: ...

    @property
    def is_writable(self) -> bool: ...

    @property
    def takes_frames(self) -> bool:
        """Whether its answer, which has begun, is in frames (RFC 9112, 7.1), and `forward` may be used."""

    def body_at_once(self) -> bytes | None:
        """The request's, once, where it is here already; `body` waits for it."""

    async def body(self) -> bytes:
        """The request's, once. Raises `RequestTooLarge`."""

    def start(self, status: int, lines: bytes) -> None:
        """`lines`: headers as they stand in a head."""

    def write(self, data: bytes) -> None: ...

    def send(self, data: bytes) -> None:
        """`write` and `flush`."""

    def forward(self, frames: bytes) -> None:
        """`send`, where it is in frames already."""

    def end(self) -> None: ...

    def flush(self) -> None: ...

    def abort(self) -> None:
        """Leave the answer without an end: the client sees that it is incomplete."""

    def hurry(self) -> None:
        """It is not waited for much longer: it reads what was written soon, or loses the connection."""

    def over(self) -> None:
        """The exchange has nothing more to do with it."""


class AsgiResponder:
    """A client behind `receive` and `send`. Used where another server, or a middleware, stands before us."""

    address: str | None = None
    takes_frames = False

    def __init__(self, receive: Receive, send: Send, content_length: bytes, limit: int) -> None:
        self._receive = receive
        self._send = send
        self._is_too_large = content_length.isdigit() and int(content_length) > limit
        self._limit = limit
        self._messages: list[Message] = []
        self._size = 0
        self._is_over = False
        self._listener: Listener | None = None
        self._wake = asyncio.Event()
        self._body: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def serve(self, listener: Listener) -> None:
        """Carry messages until the exchange is over. A cancellation is the end of the server's patience."""
        self._listener = listener
        reader = asyncio.create_task(self._read(listener))
        try:
            while not (self._is_over and not self._messages):
                await self._wake.wait()
                self._wake.clear()
                await self._send_all()
                listener.on_writable()
        except asyncio.CancelledError:
            listener.on_shutdown()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FAREWELL_TIMEOUT):
                    await self._send_all()
        finally:
            reader.cancel()
            self._body.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader

    async def _send_all(self) -> None:
        while self._messages:
            messages, self._messages, self._size = self._messages, [], 0
            for message in messages:
                await self._send(message)

    async def _read(self, listener: Listener) -> None:
        chunks: list[bytes] = []
        size = 0
        while (message := await self._receive())["type"] != "http.disconnect":
            if self._body.done():
                continue
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            self._is_too_large = self._is_too_large or size > self._limit
            if self._is_too_large or not message.get("more_body", False):
                self._body.set_result(b"".join(chunks))
        listener.on_gone()

    @property
    def is_writable(self) -> bool:
        return self._size < HIGH_WATER_BYTES

    def body_at_once(self) -> bytes | None:
        return None

    async def body(self) -> bytes:
        if not self._is_too_large:
            body = await self._body
        if self._is_too_large:
            raise too_large(self._limit)
        return body

    def start(self, status: int, lines: bytes) -> None:
        self._messages.append({"type": "http.response.start", "status": status, "headers": headers_of(lines)})

    def write(self, data: bytes) -> None:
        self._size += len(data)
        self._messages.append({"type": "http.response.body", "body": data, "more_body": True})
        if self._listener is not None and not self.is_writable:
            self._listener.on_blocked()

    def send(self, data: bytes) -> None:
        self.write(data)
        self._wake.set()

    def forward(self, frames: bytes) -> None:
        """It takes none: the server makes them."""

    def end(self) -> None:
        self._messages.append({"type": "http.response.body", "body": b"", "more_body": False})
        self._wake.set()

    def flush(self) -> None:
        self._wake.set()

    def abort(self) -> None:
        """The server closes what a response without an end was on."""

    def hurry(self) -> None:
        """The server's own limits hold."""

    def over(self) -> None:
        self._is_over = True
        self._wake.set()


def too_large(limit: int) -> RequestTooLarge:
    return RequestTooLarge(f"The request body is larger than the {limit} bytes that are allowed.")

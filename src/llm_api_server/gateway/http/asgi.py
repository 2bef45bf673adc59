"""Responder behind ASGI, for requests that another server or a middleware must handle first."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.types import Message, Receive, Send

from llm_api_server.errors import BodyTimeout
from llm_api_server.gateway.http.body_limit import body_too_large, receive_body
from llm_api_server.gateway.http.header_lines import headers_of
from llm_api_server.gateway.http.responder import LAST_WRITE_TIMEOUT, RequestListener

HIGH_WATER_BYTES = 64 * 1024


class AsgiResponder:
    """Responder on `receive` and `send`. `serve` carries its messages on the server's task."""

    address: str | None = None
    is_chunked = False

    def __init__(
        self, receive: Receive, send: Send, content_length: bytes, max_body_bytes: int, body_timeout: float
    ) -> None:
        self._receive = receive
        self._send = send
        self._is_too_large = content_length.isdigit() and int(content_length) > max_body_bytes
        self._max_body_bytes = max_body_bytes
        self._body_timeout = body_timeout
        self._messages: list[Message] = []
        self._size = 0
        self._is_closed = False
        self._listener: RequestListener | None = None
        self._wake = asyncio.Event()
        self._body: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def serve(self, listener: RequestListener) -> None:
        """Begin, and carry messages until the listener has finished.

        Cancellation means that the server waits no longer.
        """
        self._listener = listener
        listener.register()
        # Not on the server's task: a timeout in what begins must not cancel that one.
        asyncio.get_running_loop().call_soon(listener.begin)
        reader = None
        try:
            await asyncio.sleep(0)
            reader = asyncio.create_task(self._read(listener))
            while not (self._is_closed and not self._messages):
                await self._wake.wait()
                self._wake.clear()
                await self._send_all()
                listener.on_writable()
        except asyncio.CancelledError:
            listener.on_shutdown()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_WRITE_TIMEOUT):
                    await self._send_all()
        finally:
            self._body.cancel()
            if reader is not None:
                reader.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await reader

    async def _send_all(self) -> None:
        while self._messages:
            messages, self._messages, self._size = self._messages, [], 0
            for message in messages:
                await self._send(message)

    async def _read(self, listener: RequestListener) -> None:
        chunks: list[bytes] = []
        size = 0
        while (message := await self._next_message())["type"] != "http.disconnect":
            if self._body.done():
                continue
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            self._is_too_large = self._is_too_large or size > self._max_body_bytes
            if self._is_too_large or not message.get("more_body", False):
                self._body.set_result(b"".join(chunks))
        listener.on_disconnect()

    async def _next_message(self) -> Message:
        if not self._body.done():
            try:
                return await receive_body(self._receive, self._body_timeout)
            except BodyTimeout as error:
                self._body.set_exception(error)
                self._body.exception()  # read, also if the request has failed before
        return await self._receive()

    @property
    def is_writable(self) -> bool:
        return self._size < HIGH_WATER_BYTES

    @property
    def has_body(self) -> bool:
        return self._is_too_large or self._body.done()

    async def wait_body(self) -> None:
        await self._body

    def take_body(self) -> bytes:
        if self._is_too_large:
            raise body_too_large(self._max_body_bytes)
        return self._body.result()

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

    def forward(self, chunks: bytes) -> None:
        """Never called: the server frames the body."""

    def end(self) -> None:
        self._messages.append({"type": "http.response.body", "body": b"", "more_body": False})
        self._wake.set()

    def flush(self) -> None:
        self._wake.set()

    def abort(self) -> None:
        """Do nothing: the server closes the connection of a response without an end."""

    def abort_if_stalled(self) -> None:
        """Do nothing: the server's own limits apply."""

    def close(self) -> None:
        self._is_closed = True
        self._wake.set()

"""The receiving side of a request: the callbacks of a `Receiver`, and a `Response` that can be awaited."""

from __future__ import annotations

import asyncio
from typing import Protocol

HIGH_WATER_BYTES = 64 * 1024


class UpstreamError(Exception):
    """The exchange with a server failed. The message is for the log."""


class NoResponse(UpstreamError):
    """Connecting failed, or the server closed the connection before the first byte of its response."""


class BrokenResponse(UpstreamError):
    """The response ended too early or was not HTTP."""


class Receiver(Protocol):
    """Callbacks for one response, on the event loop; none follows the last data or an error."""

    def on_head(self, status: int, headers: dict[str, str]) -> None:
        """Handle the head. `headers` have lower-case names."""

    def on_data(self, data: bytes, *, is_last: bool) -> None:
        """Handle the body bytes of one read of the socket, possibly none."""

    def on_chunks(self, chunks: bytes) -> bool:
        """Take whole chunks, not the last of the body, as they arrived; return False to get their payload instead."""

    def on_error(self, error: UpstreamError) -> None: ...


class Stream(Protocol):
    """The connection that a response arrives on."""

    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def abort(self) -> None: ...


class Response:
    """Response that can be awaited. `headers` have lower-case names."""

    def __init__(self) -> None:
        self._connection: Stream | None = None
        self._pieces: list[bytes] = []
        self._buffered = 0
        self._is_complete = False
        self._error: UpstreamError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.status = 0
        self.headers: dict[str, str] = {}

    async def read(self) -> bytes:
        """Return all body bytes that have arrived, waiting for some; b"" at the end. Raises `BrokenResponse`."""
        while not self._pieces:
            if self._is_complete:
                return b""
            if self._error is not None:
                raise self._error
            await self._wait()
        data = b"".join(self._pieces)
        self._pieces.clear()
        self._buffered = 0
        if self._connection is not None:
            self._connection.resume()
        return data

    async def read_all(self, limit: int) -> bytes:
        """Return the whole body, or its first `limit` bytes and abort."""
        body = bytearray()
        while len(body) < limit and (data := await self.read()):
            body += data
        if len(body) >= limit:
            self.abort()
        return bytes(body[:limit])

    def abort(self) -> None:
        """Close the connection unless the response is complete; the engine then stops generating."""
        if self._connection is not None:
            self._connection.abort()

    async def wait_head(self, connection: Stream) -> None:
        """Wait for status and headers. Raises `UpstreamError`."""
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
            self._pieces.append(data)
            self._buffered += len(data)
        if is_last:
            self._is_complete = True
            self._connection = None
        elif self._buffered > HIGH_WATER_BYTES and self._connection is not None:
            self._connection.pause()
        self._wake()

    def on_chunks(self, chunks: bytes) -> bool:  # noqa: ARG002 - only payloads are of use here
        return False

    def on_error(self, error: UpstreamError) -> None:
        self._error = error
        self._connection = None
        self._wake()

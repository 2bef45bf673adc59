"""The client's end of a request: its body, whether it is still there, comments that keep it waiting."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from starlette.types import Message, Receive

from llm_api_server.errors import RequestTooLarge


class ClientGone(Exception):
    """The client closed its connection."""


class Pings:
    """Comments on a stream that waits. A timer until the first one is due, a task only from then on."""

    def __init__(self, ping: Callable[[], Awaitable[None]], delay: float, interval: float) -> None:
        self._ping = ping
        self._interval = interval
        self._task: asyncio.Task[None] | None = None
        self._timer = asyncio.get_running_loop().call_later(delay, self._start)

    def cancel(self) -> None:
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    async def stop(self) -> None:
        """Returns when no ping is being written any more."""
        self.cancel()
        if self._task is not None:
            # `await task` could not tell the end of the ping from a cancellation of the request itself.
            await asyncio.wait({self._task})
            with contextlib.suppress(asyncio.CancelledError, OSError):
                self._task.result()

    def _start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            await self._ping()
            await asyncio.sleep(self._interval)


@contextlib.asynccontextmanager
async def watch(receive: Receive, deadline: float, wind_down: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Raise `ClientGone` when the client leaves, `TimeoutError` when the loop's time is `deadline`.

    First `wind_down` is awaited while the body of the `async with` goes on; then that is cancelled.
    """
    request = asyncio.current_task()
    assert request is not None
    reason: Exception | None = None

    async def wait() -> None:
        nonlocal reason
        try:
            async with asyncio.timeout_at(deadline):
                while (await receive())["type"] != "http.disconnect":
                    pass
            reason = ClientGone()
        except TimeoutError as error:
            reason = error
        try:
            await wind_down()
        finally:
            request.cancel()

    watcher = asyncio.create_task(wait())
    try:
        yield
    except asyncio.CancelledError:
        if reason is not None and request.uncancel() == 0:
            raise reason from None
        raise
    except Exception:
        if reason is not None:
            raise reason from None
        raise
    finally:
        watcher.cancel()
    if reason is not None:
        raise reason


async def read_body(headers: dict[str, str], receive: Receive, limit: int) -> bytes:
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise _too_large(limit)
    chunks: list[bytes] = []
    size = 0
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _too_large(limit: int) -> RequestTooLarge:
    return RequestTooLarge(f"The request body is larger than the {limit} bytes that are allowed.")

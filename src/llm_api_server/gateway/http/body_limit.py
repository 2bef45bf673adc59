"""Bodies of requests to routes, read under a limit before FastAPI reads them without one."""

from __future__ import annotations

import asyncio

from starlette.types import Message, Receive, Scope

from llm_api_server.errors import RequestTimeout, RequestTooLarge

MAX_BYTES = 1024 * 1024
#: Seconds until the whole body must have arrived.
TIMEOUT = 60.0


def body_too_large(limit: int) -> RequestTooLarge:
    """Return the error for a body of more than `limit` bytes."""
    return RequestTooLarge(f"The request body is larger than the allowed {limit} bytes.")


async def read_small_body(scope: Scope, receive: Receive, within: float = TIMEOUT) -> Receive:
    """Read the body within that many seconds and return a `receive` that replays it.

    Raises `RequestTooLarge` or `RequestTimeout`.
    """
    try:
        async with asyncio.timeout(within):
            return _Replay(await _read(scope, receive), receive)
    except TimeoutError:
        raise RequestTimeout(f"The request body did not arrive within {within:g} seconds.") from None


async def _read(scope: Scope, receive: Receive) -> bytes:
    length = dict(scope["headers"]).get(b"content-length", b"")
    is_too_large = length.isdigit() and int(length) > MAX_BYTES
    body = bytearray()
    while not is_too_large:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(body)
        is_too_large = len(body) > MAX_BYTES
    raise body_too_large(MAX_BYTES)


class _Replay:
    """`receive` that yields a body which was read before, then what comes after it."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        body, self._body = self._body, None
        if body is None:
            return await self._receive()
        return {"type": "http.request", "body": body, "more_body": False}

"""Bodies of requests that do not go to engines, read before FastAPI does: it takes as much and as long as comes."""

from __future__ import annotations

import asyncio

from starlette.types import Message, Receive, Scope

from llm_api_server.errors import RequestTimeout, RequestTooLarge

MAX_BYTES = 1024 * 1024
#: Seconds until all of it must be here.
TIMEOUT = 60.0


async def small_body(scope: Scope, receive: Receive) -> Receive:
    """A `receive` that has the whole body at once. Raises `RequestTooLarge` or `RequestTimeout`."""
    try:
        async with asyncio.timeout(TIMEOUT):
            return _Again(await _read(scope, receive), receive)
    except TimeoutError:
        raise RequestTimeout(f"The body did not come within {TIMEOUT:g} seconds.") from None


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
    raise RequestTooLarge(f"The request body is too large here: the limit is {MAX_BYTES} bytes.")


class _Again:
    """`receive` for who has not seen that the body was read."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        body, self._body = self._body, None
        if body is None:
            return await self._receive()
        return {"type": "http.request", "body": body, "more_body": False}

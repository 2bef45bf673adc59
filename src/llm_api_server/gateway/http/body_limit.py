"""Limits on the bodies of requests, and the bodies of requests to routes, which FastAPI would read without one."""

from __future__ import annotations

import asyncio

from starlette.types import Message, Receive, Scope

from llm_api_server.errors import BodyTimeout, InvalidRequest, RequestTooLarge
from llm_api_server.gateway.http.header_lines import Headers

MAX_BYTES = 1024 * 1024
#: Seconds that a body may make no progress.
BODY_TIMEOUT = 30.0
#: Seconds until the whole body of a request to a route must have arrived.
TIMEOUT = 60.0
#: Byte order mark that some editors and libraries write before JSON.
_BOM = b"\xef\xbb\xbf"
_UNCOMPRESSED = (b"", b"identity")


def body_too_large(limit: int) -> RequestTooLarge:
    """Return the error for a body of more than `limit` bytes."""
    return RequestTooLarge(f"The request body is larger than the allowed {limit} bytes.")


def body_stalled(timeout: float) -> BodyTimeout:
    """Return the error for a body of which nothing has arrived for `timeout` seconds."""
    return BodyTimeout(f"No more of the request body arrived within {timeout:g} seconds; send the request again.")


def without_bom(body: bytes) -> bytes:
    """Return a JSON body without the byte order mark before it (RFC 8259, 8.1)."""
    return body.removeprefix(_BOM)


def check_encoding(headers: Headers) -> None:
    """Raise `InvalidRequest` if the body is compressed. Names of codings have no case (RFC 9110, 8.4.1)."""
    for name, value in headers:
        if name == b"content-encoding" and any(
            coding.strip().lower() not in _UNCOMPRESSED for coding in value.split(b",")
        ):
            raise InvalidRequest("Compressed request bodies are not accepted; send the body uncompressed.")


async def read_small_body(
    scope: Scope, receive: Receive, within: float = TIMEOUT, body_timeout: float = BODY_TIMEOUT
) -> Receive:
    """Read the body within that many seconds and return a `receive` that replays it.

    Raises `InvalidRequest`, `RequestTooLarge` or `BodyTimeout`.
    """
    check_encoding(scope["headers"])
    try:
        async with asyncio.timeout(within):
            return _Replay(without_bom(await _read(scope, receive, body_timeout)), receive)
    except TimeoutError:
        raise BodyTimeout(f"The request body did not arrive within {within:g} seconds.") from None


async def receive_body(receive: Receive, body_timeout: float) -> Message:
    """Return the next message of a body. Raises `BodyTimeout`."""
    try:
        async with asyncio.timeout(body_timeout):
            return await receive()
    except TimeoutError:
        raise body_stalled(body_timeout) from None


async def _read(scope: Scope, receive: Receive, body_timeout: float) -> bytes:
    length = dict(scope["headers"]).get(b"content-length", b"")
    is_too_large = length.isdigit() and int(length) > MAX_BYTES
    body = bytearray()
    while not is_too_large:
        message = await receive_body(receive, body_timeout)
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

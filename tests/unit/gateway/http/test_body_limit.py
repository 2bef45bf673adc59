"""Limits on the body of a request to a route."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from llm_api_server.errors import BodyTimeout, InvalidRequest, RequestTooLarge
from llm_api_server.gateway.http.body_limit import MAX_BYTES, check_encoding, read_small_body

pytestmark = pytest.mark.anyio


def scope(*headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"type": "http", "headers": list(headers)}


def receive_of(*messages: dict[str, Any]) -> Any:
    left = list(messages)

    async def receive() -> dict[str, Any]:
        return left.pop(0)

    return receive


def part(body: bytes, *, more: bool) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


async def test_the_body_is_replayed_whole_and_then_what_follows_it() -> None:
    disconnect = {"type": "http.disconnect"}
    receive = await read_small_body(scope(), receive_of(part(b"a", more=True), part(b"b", more=False), disconnect))
    assert await receive() == part(b"ab", more=False)
    assert await receive() == disconnect


async def test_an_announced_length_beyond_the_limit_is_refused_unread() -> None:
    with pytest.raises(RequestTooLarge):
        await read_small_body(scope((b"content-length", b"%d" % (MAX_BYTES + 1))), receive_of())


async def test_a_body_that_grows_beyond_the_limit_is_refused() -> None:
    with pytest.raises(RequestTooLarge):
        await read_small_body(scope(), receive_of(part(bytes(MAX_BYTES), more=True), part(b"x", more=True)))


async def test_a_body_that_does_not_arrive_in_time_is_refused() -> None:

    async def never() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    for limits in ({"within": 0.01}, {"body_timeout": 0.01}):
        with pytest.raises(BodyTimeout):
            await read_small_body(scope(), never, **limits)


async def test_a_byte_order_mark_is_left_out() -> None:
    receive = await read_small_body(scope(), receive_of(part(b"\xef\xbb", more=True), part(b"\xbf{}", more=False)))
    assert await receive() == part(b"{}", more=False)


@pytest.mark.parametrize("value", [b"identity", b"Identity", b"IDENTITY", b"", b" ", b"identity, Identity"])
def test_an_uncompressed_body_may_be_named_so_in_any_case(value: bytes) -> None:
    check_encoding([(b"content-encoding", value)])


@pytest.mark.parametrize("values", [[b"gzip"], [b"BR"], [b"identity, zstd"], [b"gzip", b"identity"]])
def test_a_compressed_body_is_refused(values: list[bytes]) -> None:
    with pytest.raises(InvalidRequest, match="send the body uncompressed"):
        check_encoding([(b"content-encoding", value) for value in values])

"""The engine client against a real socket that answers byte for byte as the test says."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from llm_api_server.gateway.addresses import Address
from llm_api_server.gateway.upstream import (
    MAX_HEAD_BYTES,
    BrokenResponse,
    NoResponse,
    Response,
    UpstreamClient,
)

pytestmark = pytest.mark.anyio
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    handling: set[asyncio.Task[None] | None] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handling.add(asyncio.current_task())
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await handler(reader, writer)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in handling:
            if task is not None:
                task.cancel()
                await asyncio.wait([task])


@pytest.fixture
async def client() -> AsyncIterator[UpstreamClient]:
    one = UpstreamClient()
    yield one
    one.close()
    await asyncio.sleep(0.01)  # let the transports say goodbye


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
    return head + await reader.readexactly(int(length.split(b":")[1]))


def answering(*pieces: bytes, then_close: bool = False) -> Handler:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.01)
            if then_close:
                return

    return handle


async def post(client: UpstreamClient, address: str, body: bytes = b"{}") -> Response:
    return await client.post(address, "/v1/x", body, content_type="application/json", headers={"x-key": "k"})


async def read_all(response: Response) -> bytes:
    return await response.read_all(1 << 30)


async def test_request_as_the_engine_sees_it(client: UpstreamClient) -> None:
    seen: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await read_request(reader))
        writer.write(OK)

    async with serving(handle) as address:
        await read_all(await post(client, f"{address}/api/v1/", b'{"a":1}'))
    head, body = seen[0].split(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /api/v1/x HTTP/1.1"
    assert {b"content-length: 7", b"x-key: k", b"accept-encoding: identity"} <= set(lines)
    assert body == b'{"a":1}'


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        ([OK], b"ok"),
        ([bytes([byte]) for byte in OK], b"ok"),
        ([b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n", b"1\r\n!\r\n0\r\n\r\n"], b"ok!"),
        ([b"HTTP/1.1 100 Continue\r\n\r\n", OK], b"ok"),
        ([b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"], b""),
        ([b"HTTP/1.1 204 No Content\r\n\r\n"], b""),
    ],
)
async def test_bodies_and_reuse(client: UpstreamClient, answer: list[bytes], body: bytes) -> None:
    async with serving(answering(*answer)) as address:
        for _ in range(3):
            assert await read_all(await post(client, address)) == body


async def test_body_that_ends_with_the_connection(client: UpstreamClient) -> None:
    async with serving(answering(b"HTTP/1.1 200 OK\r\n\r\nhello ", b"world", then_close=True)) as address:
        assert await read_all(await post(client, address)) == b"hello world"


@pytest.mark.parametrize(
    "answer",
    [b"garbage\r\n\r\n", b"HTTP/1.1 200 OK\r\nx: " + b"y" * (MAX_HEAD_BYTES + 1), b"HTTP/1.1 200 OK\r\ncontent-"],
)
async def test_heads_that_are_none(client: UpstreamClient, answer: bytes) -> None:
    async with serving(answering(answer, then_close=True)) as address:
        with pytest.raises(BrokenResponse):
            await post(client, address)


async def test_body_that_breaks_off_is_read_to_where_it_breaks(client: UpstreamClient) -> None:
    broken = answering(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf", then_close=True)
    async with serving(broken) as address:
        response = await post(client, address)
        assert await response.read() == b"half"
        with pytest.raises(BrokenResponse):
            await response.read()


async def test_nobody_there(client: UpstreamClient) -> None:
    async with serving(answering(OK)) as address:
        pass
    for nobody in (address, "unix:/nonexistent/engine.sock"):
        with pytest.raises(NoResponse):
            await post(client, nobody)


async def test_fresh_connection_that_is_closed_is_not_tried_again(client: UpstreamClient) -> None:
    requests: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await read_request(reader))

    async with serving(handle) as address:
        with pytest.raises(NoResponse):
            await post(client, address)
    assert len(requests) == 1


async def test_pooled_connection_closed_meanwhile_is_tried_once_more(client: UpstreamClient) -> None:
    """It reads the second request and closes without a word, as llama.cpp does when a request meets its closing."""
    requests: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await read_request(reader))
        writer.write(OK)
        await read_request(reader)

    async with serving(handle) as address:
        for _ in range(3):
            assert await read_all(await post(client, address)) == b"ok"
    assert len(requests) == 3


async def test_bytes_that_nobody_asked_for_cost_the_connection(client: UpstreamClient) -> None:
    """An answer smuggled in front of the next one must not be taken for it."""
    async with serving(answering(OK + b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil")) as address:
        for _ in range(3):
            with contextlib.suppress(BrokenResponse):
                assert await read_all(await post(client, address)) == b"ok"


async def test_abort_closes_the_connection(client: UpstreamClient) -> None:
    closed = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\nx")
        assert await reader.read() == b""
        closed.set()

    async with serving(handle) as address:
        response = await post(client, address)
        response.abort()
        await closed.wait()


async def test_cancelled_wait_for_the_head_closes_the_connection(client: UpstreamClient) -> None:
    got, closed = asyncio.Event(), asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        got.set()
        with contextlib.suppress(OSError):
            await reader.read()
        closed.set()

    async with serving(handle) as address:
        waiting = asyncio.create_task(post(client, address))
        await got.wait()
        waiting.cancel()
        await closed.wait()


@pytest.mark.parametrize(
    ("text", "host", "target"),
    [
        ("unix:/run/x.sock", "localhost", "/v1/x"),
        ("http://h:80", "h", "/v1/x"),
        ("http://h:81/", "h:81", "/v1/x"),
        ("https://h/v1", "h", "/v1/x"),
        ("https://h:443/openai/v1/", "h", "/openai/v1/x"),
    ],
)
async def test_addresses(text: str, host: str, target: str) -> None:
    address = Address.parse(text)
    assert (address.host_header, address.target("/v1/x")) == (host, target)

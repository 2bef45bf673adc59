"""The client against a real socket that sends byte for byte what the test gives it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from llm_api_server.http_client.address import Address
from llm_api_server.http_client.client import HttpClient
from llm_api_server.http_client.connection import MAX_HEAD_BYTES
from llm_api_server.http_client.response import BrokenResponse, NoResponse, Response

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
async def client() -> AsyncIterator[HttpClient]:
    one = HttpClient()
    yield one
    one.close()
    await asyncio.sleep(0)  # transports close in the next iteration


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
    return head + await reader.readexactly(int(length.split(b":")[1]))


def responding(*pieces: bytes, then_close: bool = False) -> Handler:
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


async def post(client: HttpClient, address: str, body: bytes = b"{}") -> Response:
    return await client.post(address, "/v1/x", body, content_type="application/json", headers={"x-key": "k"})


async def read_all(response: Response) -> bytes:
    return await response.read_all(1 << 30)


async def test_a_request_has_target_headers_and_body(client: HttpClient) -> None:
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
    ("response", "body"),
    [
        ([OK], b"ok"),
        ([bytes([byte]) for byte in OK], b"ok"),
        ([b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n", b"1\r\n!\r\n0\r\n\r\n"], b"ok!"),
        ([b"HTTP/1.1 100 Continue\r\n\r\n", OK], b"ok"),
        ([b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"], b""),
        ([b"HTTP/1.1 204 No Content\r\n\r\n"], b""),
    ],
)
async def test_bodies_of_every_framing_are_read_over_one_connection(
    client: HttpClient, response: list[bytes], body: bytes
) -> None:
    async with serving(responding(*response)) as address:
        for _ in range(3):
            assert await read_all(await post(client, address)) == body


async def test_a_body_may_end_with_the_connection(client: HttpClient) -> None:
    async with serving(responding(b"HTTP/1.1 200 OK\r\n\r\nhello ", b"world", then_close=True)) as address:
        assert await read_all(await post(client, address)) == b"hello world"


@pytest.mark.parametrize(
    "response",
    [b"garbage\r\n\r\n", b"HTTP/1.1 200 OK\r\nx: " + b"y" * (MAX_HEAD_BYTES + 1), b"HTTP/1.1 200 OK\r\ncontent-"],
)
async def test_an_invalid_head_breaks_the_response(client: HttpClient, response: bytes) -> None:
    async with serving(responding(response, then_close=True)) as address:
        with pytest.raises(BrokenResponse):
            await post(client, address)


async def test_a_broken_body_is_read_up_to_the_break(client: HttpClient) -> None:
    broken = responding(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf", then_close=True)
    async with serving(broken) as address:
        response = await post(client, address)
        assert await response.read() == b"half"
        with pytest.raises(BrokenResponse):
            await response.read()


async def test_an_unreachable_server_sends_no_response(client: HttpClient) -> None:
    async with serving(responding(OK)) as address:
        pass
    for unreachable in (address, "unix:/nonexistent/engine.sock"):
        with pytest.raises(NoResponse):
            await post(client, unreachable)


async def test_a_request_on_a_new_connection_is_not_repeated(client: HttpClient) -> None:
    requests: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await read_request(reader))

    async with serving(handle) as address:
        with pytest.raises(NoResponse):
            await post(client, address)
    assert len(requests) == 1


async def test_a_request_on_a_stale_connection_is_repeated_once(client: HttpClient) -> None:
    """llama.cpp reads a request and closes without a response if it was about to close the connection."""
    requests: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await read_request(reader))
        writer.write(OK)
        await read_request(reader)

    async with serving(handle) as address:
        for _ in range(3):
            assert await read_all(await post(client, address)) == b"ok"
    assert len(requests) == 3


async def test_bytes_after_a_response_close_the_connection(client: HttpClient) -> None:
    """A response smuggled in front of the next one must not be taken for it."""
    async with serving(responding(OK + b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil")) as address:
        for _ in range(3):
            with contextlib.suppress(BrokenResponse):
                assert await read_all(await post(client, address)) == b"ok"


async def test_abort_closes_the_connection(client: HttpClient) -> None:
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


async def test_cancelling_the_wait_for_the_head_closes_the_connection(client: HttpClient) -> None:
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


async def test_every_connection_goes_to_the_resolved_address() -> None:
    resolved: list[tuple[str, int]] = []

    async def resolve(address: Address) -> str:
        resolved.append((address.host, address.port))
        return "127.0.0.1"

    client = HttpClient(resolve=resolve)
    async with serving(responding(OK)) as address:
        port = int(address.rpartition(":")[2])
        assert await read_all(await post(client, f"http://example.com:{port}")) == b"ok"
    client.close()
    assert resolved == [("example.com", port)]


async def test_an_error_of_the_resolver_reaches_the_caller() -> None:
    async def refuse(_address: Address) -> str:
        raise LookupError("refused")

    client = HttpClient(resolve=refuse)
    with pytest.raises(LookupError, match="refused"):
        await post(client, "http://example.com")
    client.close()

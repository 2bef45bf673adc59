"""The engine client against a real socket that answers byte for byte as the test says."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_api_server.event_loop.write_buffer import WriteBuffer
from llm_api_server.http_client.address import Address
from llm_api_server.http_client.client import HttpClient
from llm_api_server.http_client.connection import MAX_HEAD_BYTES, Connection, Pool
from llm_api_server.http_client.response import BrokenResponse, NoResponse, Response, UpstreamError

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


async def post(client: HttpClient, address: str, body: bytes = b"{}") -> Response:
    return await client.post(address, "/v1/x", body, content_type="application/json", headers={"x-key": "k"})


async def read_all(response: Response) -> bytes:
    return await response.read_all(1 << 30)


async def test_request_as_the_engine_sees_it(client: HttpClient) -> None:
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
async def test_bodies_and_reuse(client: HttpClient, answer: list[bytes], body: bytes) -> None:
    async with serving(answering(*answer)) as address:
        for _ in range(3):
            assert await read_all(await post(client, address)) == body


async def test_body_that_ends_with_the_connection(client: HttpClient) -> None:
    async with serving(answering(b"HTTP/1.1 200 OK\r\n\r\nhello ", b"world", then_close=True)) as address:
        assert await read_all(await post(client, address)) == b"hello world"


@pytest.mark.parametrize(
    "answer",
    [b"garbage\r\n\r\n", b"HTTP/1.1 200 OK\r\nx: " + b"y" * (MAX_HEAD_BYTES + 1), b"HTTP/1.1 200 OK\r\ncontent-"],
)
async def test_heads_that_are_none(client: HttpClient, answer: bytes) -> None:
    async with serving(answering(answer, then_close=True)) as address:
        with pytest.raises(BrokenResponse):
            await post(client, address)


async def test_body_that_breaks_off_is_read_to_where_it_breaks(client: HttpClient) -> None:
    broken = answering(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf", then_close=True)
    async with serving(broken) as address:
        response = await post(client, address)
        assert await response.read() == b"half"
        with pytest.raises(BrokenResponse):
            await response.read()


async def test_nobody_there(client: HttpClient) -> None:
    async with serving(answering(OK)) as address:
        pass
    for nobody in (address, "unix:/nonexistent/engine.sock"):
        with pytest.raises(NoResponse):
            await post(client, nobody)


async def test_fresh_connection_that_is_closed_is_not_tried_again(client: HttpClient) -> None:
    requests: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await read_request(reader))

    async with serving(handle) as address:
        with pytest.raises(NoResponse):
            await post(client, address)
    assert len(requests) == 1


async def test_pooled_connection_closed_meanwhile_is_tried_once_more(client: HttpClient) -> None:
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


async def test_bytes_that_nobody_asked_for_cost_the_connection(client: HttpClient) -> None:
    """An answer smuggled in front of the next one must not be taken for it."""
    async with serving(answering(OK + b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil")) as address:
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


async def test_cancelled_wait_for_the_head_closes_the_connection(client: HttpClient) -> None:
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


# ── bodies in frames: what is ordinary is read here, everything else by the parser ──

STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


class Recorder:
    """A receiver that takes frames as they are, or what is in them."""

    def __init__(self, *, takes_frames: bool) -> None:
        self.takes_frames = takes_frames
        self.heads: list[tuple[int, dict[str, str]]] = []
        self.body = b""
        self.frames = b""
        self.lasts: list[bool] = []
        self.errors: list[UpstreamError] = []

    def on_head(self, status: int, headers: dict[str, str]) -> None:
        self.heads.append((status, headers))

    def on_data(self, data: bytes, *, is_last: bool) -> None:
        self.body += data
        self.lasts.append(is_last)

    def on_chunks(self, frames: bytes) -> bool:
        if self.takes_frames:
            self.frames += frames
            payload = Recorder(takes_frames=False)
            received(STREAM_HEAD + frames + b"0\r\n\r\n", [], payload)
            self.body += payload.body
        return self.takes_frames

    def on_error(self, error: UpstreamError) -> None:
        self.errors.append(error)


class NoTransport(asyncio.Transport):
    def write(self, data: bytes | bytearray | memoryview) -> None: ...

    def abort(self) -> None: ...

    def is_closing(self) -> bool:
        return False


def received(answer: bytes, cuts: list[int], receiver: Recorder) -> Pool:
    """What `receiver` gets of `answer`, cut into reads. The pool has the connection again where it is still good."""
    pool = Pool(Address.parse("unix:/x"), WriteBuffer(), idle_timeout=math.inf)
    connection = Connection(pool)
    connection.connection_made(NoTransport())
    connection.start(b"", receiver)
    places = [0, *sorted(cut % (len(answer) + 1) for cut in cuts), len(answer)]
    for start, end in itertools.pairwise(places):
        if start < end:
            connection.data_received(answer[start:end])
    return pool


def framed(payload: bytes, form: str) -> bytes:
    size = {"upper": b"%X", "zeros": b"000%x", "extension": b"%x;name=value"}.get(form, b"%x") % len(payload)
    return size + b"\r\n" + payload + b"\r\n"


@given(
    payloads=st.lists(st.binary(min_size=1, max_size=40) | st.sampled_from([b"\r\n", b"0\r\n\r\n", b"a" * 5000])),
    forms=st.lists(st.sampled_from(["", "", "", "upper", "zeros", "extension"]), min_size=1),
    end=st.sampled_from([b"0\r\n\r\n", b"0\r\nx-trailer: 1\r\n\r\n", b"00\r\n\r\n"]),
    cuts=st.lists(st.integers(0, 1 << 20), max_size=6),
    takes_frames=st.booleans(),
)
def test_frames_are_read_alike_however_they_are_written_and_cut(
    payloads: list[bytes], forms: list[str], end: bytes, cuts: list[int], takes_frames: bool
) -> None:
    frames = [framed(payload, form) for payload, form in zip(payloads, itertools.cycle(forms), strict=False)]
    receiver = Recorder(takes_frames=takes_frames)
    pool = received(STREAM_HEAD + b"".join(frames) + end, cuts, receiver)
    assert receiver.body == b"".join(payloads)
    assert receiver.lasts[-1:] == [True]
    assert receiver.lasts.count(True) == 1
    assert [status for status, _ in receiver.heads] == [200]
    assert receiver.heads[0][1]["content-type"] == "text/event-stream"
    assert not receiver.errors
    assert pool.take_idle() is not None


@pytest.mark.parametrize("takes_frames", [False, True])
def test_frames_are_read_alike_wherever_two_reads_are_cut(takes_frames: bool) -> None:
    """llama.cpp, for one, writes the last line and the empty one behind it apart."""
    answer = STREAM_HEAD + framed(b"data: a\n\n", "") + framed(b"b" * 12, "") + b"0\r\n\r\n"
    for one in range(1, len(answer)):
        for other in range(one, len(answer)):
            receiver = Recorder(takes_frames=takes_frames)
            pool = received(answer, [one, other], receiver)
            assert (receiver.body, receiver.lasts[-1]) == (b"data: a\n\n" + b"b" * 12, True)
            assert pool.take_idle() is not None


def test_whole_frames_are_handed_on_as_they_came() -> None:
    receiver = Recorder(takes_frames=True)
    one, two = framed(b"data: a\n\n", ""), framed(b"data: bc\n\n", "") + framed(b"data: d\n\n", "")
    head = len(STREAM_HEAD)
    received(STREAM_HEAD + one + two + b"0\r\n\r\n", [head, head + len(one), head + len(one + two)], receiver)
    assert receiver.frames == one + two
    assert receiver.lasts == [True]


@pytest.mark.parametrize(
    "wrong", [b"zz\r\nab\r\n", b"3\r\nab\r\n", b"-1\r\n", b"1\r\nabc\r\n", b"\r\n", b"1 \r\na\r\n\r\n"]
)
def test_frames_that_are_none_break_the_answer(wrong: bytes) -> None:
    receiver = Recorder(takes_frames=True)
    pool = received(STREAM_HEAD + framed(b"a", "") + wrong + b"0\r\n\r\n", [len(STREAM_HEAD)], receiver)
    assert [type(error) for error in receiver.errors] == [BrokenResponse]
    assert pool.take_idle() is None


def test_what_comes_behind_the_last_frame_costs_the_connection() -> None:
    receiver = Recorder(takes_frames=True)
    pool = received(STREAM_HEAD + framed(b"a", "") + b"0\r\n\r\nHTTP/1.1 200 OK\r\n", [], receiver)
    assert receiver.body == b"a"
    assert pool.take_idle() is None

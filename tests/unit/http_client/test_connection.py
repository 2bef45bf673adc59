"""Chunked responses: the usual form is read without the parser, every other form by it, with the same result."""

from __future__ import annotations

import asyncio
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_api_server.event_loop.write_buffer import WriteBuffer
from llm_api_server.http_client.address import Address
from llm_api_server.http_client.connection import Connection, Pool
from llm_api_server.http_client.response import BrokenResponse, UpstreamError

STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


class Recorder:
    """A receiver that takes chunks as they are, or their payloads."""

    def __init__(self, *, takes_chunks: bool) -> None:
        self.takes_chunks = takes_chunks
        self.heads: list[tuple[int, dict[str, str]]] = []
        self.body = b""
        self.chunks = b""
        self.lasts: list[bool] = []
        self.errors: list[UpstreamError] = []

    def on_head(self, status: int, headers: dict[str, str]) -> None:
        self.heads.append((status, headers))

    def on_data(self, data: bytes, *, is_last: bool) -> None:
        self.body += data
        self.lasts.append(is_last)

    def on_chunks(self, chunks: bytes) -> bool:
        if self.takes_chunks:
            self.chunks += chunks
            payload = Recorder(takes_chunks=False)
            received(STREAM_HEAD + chunks + b"0\r\n\r\n", [], payload)
            self.body += payload.body
        return self.takes_chunks

    def on_error(self, error: UpstreamError) -> None:
        self.errors.append(error)


class NoTransport(asyncio.Transport):
    def write(self, data: bytes | bytearray | memoryview) -> None: ...

    def abort(self) -> None: ...

    def is_closing(self) -> bool:
        return False


def received(response: bytes, cuts: list[int], receiver: Recorder) -> Pool:
    """Deliver `response` to `receiver`, cut into reads; return the pool, which has the connection if it is usable."""
    pool = Pool(Address.parse("unix:/x"), WriteBuffer(), idle_timeout=math.inf)
    connection = Connection(pool)
    connection.connection_made(NoTransport())
    connection.start(b"", receiver)
    bounds = [0, *sorted(cut % (len(response) + 1) for cut in cuts), len(response)]
    for start, end in itertools.pairwise(bounds):
        if start < end:
            connection.data_received(response[start:end])
    return pool


def chunk(payload: bytes, form: str) -> bytes:
    size = {"upper": b"%X", "zeros": b"000%x", "extension": b"%x;name=value"}.get(form, b"%x") % len(payload)
    return size + b"\r\n" + payload + b"\r\n"


@given(
    payloads=st.lists(st.binary(min_size=1, max_size=40) | st.sampled_from([b"\r\n", b"0\r\n\r\n", b"a" * 5000])),
    forms=st.lists(st.sampled_from(["", "", "", "upper", "zeros", "extension"]), min_size=1),
    end=st.sampled_from([b"0\r\n\r\n", b"0\r\nx-trailer: 1\r\n\r\n", b"00\r\n\r\n"]),
    cuts=st.lists(st.integers(0, 1 << 20), max_size=6),
    takes_chunks=st.booleans(),
)
def test_chunks_are_read_alike_in_every_form_and_cut(
    payloads: list[bytes], forms: list[str], end: bytes, cuts: list[int], takes_chunks: bool
) -> None:
    chunks = [chunk(payload, form) for payload, form in zip(payloads, itertools.cycle(forms), strict=False)]
    receiver = Recorder(takes_chunks=takes_chunks)
    pool = received(STREAM_HEAD + b"".join(chunks) + end, cuts, receiver)
    assert receiver.body == b"".join(payloads)
    assert receiver.lasts[-1:] == [True]
    assert receiver.lasts.count(True) == 1
    assert [status for status, _ in receiver.heads] == [200]
    assert receiver.heads[0][1]["content-type"] == "text/event-stream"
    assert not receiver.errors
    assert pool.take_idle() is not None


@pytest.mark.parametrize("takes_chunks", [False, True])
def test_chunks_are_read_alike_at_every_pair_of_cuts(takes_chunks: bool) -> None:
    """llama.cpp writes the last line and the empty line after it separately."""
    response = STREAM_HEAD + chunk(b"data: a\n\n", "") + chunk(b"b" * 12, "") + b"0\r\n\r\n"
    for one in range(1, len(response)):
        for other in range(one, len(response)):
            receiver = Recorder(takes_chunks=takes_chunks)
            pool = received(response, [one, other], receiver)
            assert (receiver.body, receiver.lasts[-1]) == (b"data: a\n\n" + b"b" * 12, True)
            assert pool.take_idle() is not None


def test_whole_chunks_are_passed_on_as_they_arrive() -> None:
    receiver = Recorder(takes_chunks=True)
    one, two = chunk(b"data: a\n\n", ""), chunk(b"data: bc\n\n", "") + chunk(b"data: d\n\n", "")
    head = len(STREAM_HEAD)
    received(STREAM_HEAD + one + two + b"0\r\n\r\n", [head, head + len(one), head + len(one + two)], receiver)
    assert receiver.chunks == one + two
    assert receiver.lasts == [True]


@pytest.mark.parametrize(
    "wrong", [b"zz\r\nab\r\n", b"3\r\nab\r\n", b"-1\r\n", b"1\r\nabc\r\n", b"\r\n", b"1 \r\na\r\n\r\n"]
)
def test_invalid_chunks_break_the_response(wrong: bytes) -> None:
    receiver = Recorder(takes_chunks=True)
    pool = received(STREAM_HEAD + chunk(b"a", "") + wrong + b"0\r\n\r\n", [len(STREAM_HEAD)], receiver)
    assert [type(error) for error in receiver.errors] == [BrokenResponse]
    assert pool.take_idle() is None


def test_bytes_after_the_last_chunk_close_the_connection() -> None:
    receiver = Recorder(takes_chunks=True)
    pool = received(STREAM_HEAD + chunk(b"a", "") + b"0\r\n\r\nHTTP/1.1 200 OK\r\n", [], receiver)
    assert receiver.body == b"a"
    assert pool.take_idle() is None

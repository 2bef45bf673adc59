"""A head that repeats is read without a parser, and only where the parser would read the same."""

from __future__ import annotations

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_api_server.gateway.http.head_cache import HeadCache
from llm_api_server.gateway.http.request_head import RequestHead

CHAT = "/v1/chat/completions"
LINES = [b"host: x", b"authorization: Bearer sk-1", b"content-type: application/json"]


def request(body: bytes, *more: bytes, length: bytes | None = None) -> bytes:
    lines = [*LINES, *more, b"Content-Length: " + (b"%d" % len(body) if length is None else length), b"accept: */*"]
    return b"POST /v1/chat/completions HTTP/1.1\r\n" + b"\r\n".join(lines) + b"\r\n\r\n" + body


class Parsed:
    """What httptools makes of it."""

    def __init__(self, data: bytes) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.is_complete = False
        httptools.HttpRequestParser(self).feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.is_complete = True


def learn(data: bytes, **facts: bool) -> HeadCache | None:
    return HeadCache.learn(RequestHead(CHAT, Parsed(data).headers, **facts), data)


@given(st.binary(min_size=1, max_size=300), st.binary(min_size=1, max_size=300))
def test_the_body_behind_a_known_head_is_what_the_parser_finds(first: bytes, second: bytes) -> None:
    repeated = learn(request(first))
    assert repeated is not None
    assert repeated.body_of(request(second)) == second
    assert repeated.head.headers[b"authorization"] == b"Bearer sk-1"


@given(st.data())
def test_whatever_is_taken_for_a_known_head_the_parser_reads_alike(data: st.DataObject) -> None:
    repeated = learn(request(b'{"a": 1}'))
    assert repeated is not None
    sent = bytearray(request(data.draw(st.binary(min_size=1, max_size=40))))
    for _ in range(data.draw(st.integers(0, 2))):
        place = data.draw(st.integers(0, len(sent) - 1))
        sent[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    body = repeated.body_of(bytes(sent))
    if body is not None:
        parsed = Parsed(bytes(sent))
        assert (parsed.body, parsed.is_complete) == (body, True)
        same = [pair for pair in parsed.headers if pair[0] != b"content-length"]
        assert same == [pair for pair in repeated.head.raw if pair[0] != b"content-length"]


@pytest.mark.parametrize(
    "sent",
    [
        request(b"abc")[:-1],
        request(b"abc") + b"P",
        request(b"abc").replace(b"sk-1", b"sk-2"),
        request(b"abc", b"x-one: 1"),
        request(b"abc", length=b"3 "),
        request(b"abc", length=b"+3"),
        request(b"abc", length=b""),
        request(b"abc").replace(b"POST", b"PUT "),
        request(b"abc")[:30],
    ],
)
def test_anything_else_is_left_to_the_parser(sent: bytes) -> None:
    repeated = learn(request(b"xyz"))
    assert repeated is not None
    assert repeated.body_of(sent) is None


def test_heads_that_say_more_are_not_learnt() -> None:
    body = b"{}"
    assert learn(request(body), keep_alive=False) is None
    assert learn(request(body), can_chunk=False) is None
    assert learn(request(body), expects_continue=True) is None
    assert HeadCache.learn(RequestHead(CHAT, Parsed(request(body)).headers), request(body) + b"x") is None
    chunked = request(body).replace(b"Content-Length: 2", b"Transfer-Encoding: chunked")
    assert HeadCache.learn(RequestHead(CHAT, [(b"transfer-encoding", b"chunked")]), chunked) is None
    twice = request(body, b"content-length: 2")
    assert HeadCache.learn(RequestHead(CHAT, [(b"content-length", b"2"), (b"content-length", b"2")]), twice) is None

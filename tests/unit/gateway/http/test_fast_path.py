"""The head cache changes nothing: a connection with it and one that always parses behave alike."""

from __future__ import annotations

import asyncio
import gc
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn.server import ServerState

from llm_api_server.config.models import ApiKeyConfig, AuthConfig, Config, ModelConfig, ModelsConfig, ServerConfig
from llm_api_server.gateway.app import build_worker
from llm_api_server.gateway.http.fast_path import HttpProtocol
from llm_api_server.gateway.http.head_cache import HeadCache
from llm_api_server.gateway.http.responder import REQUEST_HANDLER
from llm_api_server.gateway.manager_link.leases import HeldSlots, Leases
from llm_api_server.gateway.manager_link.link import ManagerLink
from llm_api_server.gateway.proxy.running_requests import RunningRequests
from llm_api_server.http_client.client import HttpClient
from llm_api_server.http_client.connection import Connection
from llm_api_server.ipc.lease_messages import InstanceInfo
from llm_api_server.ipc.run_dir import RunDir

KEY = "sk-test-0123456789abcdef"
CONFIG = Config(
    server=ServerConfig(max_body_bytes=2000),
    auth=AuthConfig(api_keys=[ApiKeyConfig(key=KEY, name="all")]),
    models=ModelsConfig(default="m", available={"m": ModelConfig(path="org/m", engine="vllm")}),
)
RESPONSE = b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 13\r\n\r\n{"choices":1}'
#: What differs between two runs of the same requests.
VARYING = re.compile(rb"(x-request-id|openai-processing-ms|date): [^\r]*\r\n")


class HttpProtocolWithoutCache(HttpProtocol):
    caches_heads = False


class FakeTransport:
    """Passes writes to `on_write`, until it is closed."""

    def __init__(self, on_write: Callable[[bytes], None]) -> None:
        self._on_write = on_write
        self._is_closing = False

    def write(self, data: bytes) -> None:
        self._on_write(data)

    def close(self) -> None:
        self._is_closing = True

    def is_closing(self) -> bool:
        return self._is_closing

    def get_extra_info(self, name: str, _default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name in {"peername", "sockname"} else None

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    abort = close


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Serve the requests that do not go to an engine."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def converse(http: type[HttpProtocol], reads: list[bytes]) -> tuple[bytes, bytes]:
    """Return the bytes that client and engine get for these reads of one connection, without what varies."""
    loop = asyncio.get_running_loop()
    client, leases = HttpClient(), Leases(ManagerLink(RunDir(Path("/nonexistent")), lambda _: None))
    held = leases._held["i"] = HeldSlots(InstanceInfo("i", "m", "vllm", "unix:/engine"))
    held.slots, held.until_revoked = 100, True
    handler = build_worker(CONFIG, leases, client, RunningRequests()).proxy
    server = uvicorn.Config(app, http=http, ws="none", log_config=None)
    server.load()
    to_client: list[bytes] = []
    to_engine: list[bytes] = []
    engine = Connection(pool := client._pool("unix:/engine"))

    def respond(request: bytes) -> None:
        to_engine.append(request)
        loop.call_soon(engine.data_received, RESPONSE)

    engine.connection_made(cast("Any", FakeTransport(respond)))
    engine.idle_since = float("inf")
    pool.release(engine)
    connection = http(server, ServerState(), {REQUEST_HANDLER: handler}, loop)
    transport = FakeTransport(to_client.append)
    connection.connection_made(cast("Any", transport))
    for data in reads:
        if not transport.is_closing():
            connection.data_received(data)
        for _ in range(40):
            await asyncio.sleep(0)
    connection.connection_lost(None)
    return VARYING.sub(b"", b"".join(to_client)), VARYING.sub(b"", b"".join(to_engine))


def request(body: bytes, *lines: bytes, path: bytes = b"/v1/chat/completions") -> bytes:
    head = [b"POST %b HTTP/1.1" % path, b"host: x", b"authorization: Bearer " + KEY.encode(), *lines]
    return b"\r\n".join([*head, b"content-length: %d" % len(body), b"", body])


def chat(text: str) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": text}]}).encode()


bodies = st.one_of(st.text(max_size=20).map(chat), st.binary(max_size=20), st.just(chat("a" * 3000)))
requests = st.one_of(
    bodies.map(request),
    bodies.map(lambda body: request(body, b"x-request-id: mine")),
    bodies.map(lambda body: request(body, b"connection: close")),
    bodies.map(lambda body: request(body, b"connection: Upgrade, HTTP2-Settings", b"upgrade: h2c")),
    bodies.map(lambda body: request(body, path=b"/v1/completions")),
    bodies.map(lambda body: request(body).replace(b"authorization", b"x-nothing")),
    bodies.map(lambda body: request(body).replace(b"content-length: ", b"Content-Length:  ")),
    st.just(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"),
    st.just(
        request(b"", b"transfer-encoding: chunked").replace(b"content-length: 0\r\n", b"") + b"2\r\n{}\r\n0\r\n\r\n"
    ),
)


@st.composite
def reads(draw: st.DrawFn) -> list[bytes]:
    """Requests, mostly each in a read of its own, with some bytes changed and some reads cut or joined."""
    found: list[bytes] = []
    for data in draw(st.lists(requests, min_size=1, max_size=6)):
        sent = bytearray(data)
        for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
            start = draw(st.integers(0, len(sent)))
            sent[start : start + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
        cut = draw(st.one_of(st.just(0), st.just(0), st.integers(0, len(sent))))
        if found and draw(st.sampled_from([False, False, True])):
            found[-1] += bytes(sent[:cut] or sent)
        else:
            found.append(bytes(sent[:cut] or sent))
        if cut:
            found.append(bytes(sent[cut:]))
    return [data for data in found if data]


@settings(deadline=None, max_examples=40)
@given(reads())
def test_client_and_engine_get_the_same_bytes_with_and_without_the_head_cache(reads: list[bytes]) -> None:
    with_cache = asyncio.run(converse(HttpProtocol, reads))
    assert with_cache == asyncio.run(converse(HttpProtocolWithoutCache, reads))


@pytest.mark.parametrize(("http", "hits"), [(HttpProtocol, 2), (HttpProtocolWithoutCache, 0)])
def test_a_repeated_head_is_recognised_unless_the_cache_is_off(
    http: type[HttpProtocol], hits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[bytes] = []
    body_of = HeadCache.body_of

    def counted(cache: HeadCache, data: bytes) -> bytes | None:
        body = body_of(cache, data)
        if body is not None:
            found.append(body)
        return body

    monkeypatch.setattr(HeadCache, "body_of", counted)
    to_client, to_engine = asyncio.run(converse(http, [request(chat(text)) for text in "abc"]))
    assert (to_client.count(b'{"choices":1}'), to_engine.count(b'"content": "')) == (3, 3)
    assert len(found) == hits


def test_requests_leave_no_cycles_for_the_garbage_collector() -> None:
    """Half of a request's time was the collector's while they did."""

    async def cycles() -> list[str]:
        reads = [request(chat(str(number))) for number in range(20)]
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            await converse(HttpProtocol, reads)
            gc.collect()
            return [type(one).__name__ for one in gc.garbage]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()

    found = asyncio.run(cycles())
    # The connection itself goes with its last responder.
    assert all(found.count(name) <= 1 for name in ("Exchange", "Relay", "ClientResponse", "DirectResponder"))
    assert "coroutine" not in found

"""HTTP connections to a worker: heads, order, limits, headers, CORS."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llm_api_server.config.models import ServerConfig
from llm_api_server.gateway.http.fast_path import MAX_HEAD_BYTES
from llm_api_server.ipc.run_dir import RunDir
from tests.gateway_worker import KEY, Gateway, chat_body, events, make_config, run_gateway

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("first", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /he"])
async def test_connection_without_a_complete_head_is_closed_after_the_keep_alive_timeout(
    gateway: Gateway, first: bytes
) -> None:
    """Nothing came, or half a head, or half a second head."""
    gateway.server.config.timeout_keep_alive = 0.3  # type: ignore[assignment] # whole seconds by its declaration
    reader, writer = await asyncio.open_connection(gateway.client.base_url.host, gateway.client.base_url.port)
    writer.write(first)
    response = await reader.read()
    assert response.count(b"HTTP/1.1 200") == first.count(b"\r\n\r\n")
    writer.close()


async def test_endless_head_is_refused_and_a_long_one_is_not(gateway: Gateway) -> None:
    assert (await gateway.client.get("/health", headers={"x-long": "a" * 100_000})).status_code == 200
    reader, writer = await asyncio.open_connection(gateway.client.base_url.host, gateway.client.base_url.port)
    writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /health HTTP/1.1\r\nx-endless: ")
    assert b" 200 " in await reader.readline()
    writer.write(b"a" * (MAX_HEAD_BYTES + 1))
    assert b"The headers of your request are too long." in await reader.read()
    writer.close()


def raw_chat(body: bytes, *lines: bytes) -> bytes:
    head = [b"POST /v1/chat/completions HTTP/1.1", b"host: x", b"content-length: %d" % len(body), *lines]
    return b"\r\n".join([*head, b"authorization: Bearer " + KEY.encode(), b"", body])


async def test_pipelined_requests_get_their_responses_in_order(gateway: Gateway) -> None:
    """Some responses come at once, some from an engine, one from a route; the last closes the connection."""
    good = json.dumps({"messages": [{"role": "user", "content": "hello"}]}).encode()
    get = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    requests = [raw_chat(b"{"), get, raw_chat(good), raw_chat(b'{"model":"no"}'), raw_chat(good), get]
    reader, writer = await asyncio.open_connection(gateway.client.base_url.host, gateway.client.base_url.port)
    for _ in range(2):
        writer.write(b"".join(requests))
        response = b""
        while response.count(b"HTTP/1.1 ") < len(requests) or not response.endswith(b"}"):
            response += await reader.read(65536)
        assert [int(status) for status in re.findall(rb"HTTP/1.1 (\d+) ", response)] == [400, 200, 200, 400, 200, 200]
    writer.write(raw_chat(b"{") + raw_chat(b"{", b"connection: close"))
    assert (await reader.read()).count(b"HTTP/1.1 400") == 2
    writer.close()


async def test_half_closed_connection_still_gets_an_immediate_response(gateway: Gateway) -> None:
    reader, writer = await asyncio.open_connection(gateway.client.base_url.host, gateway.client.base_url.port)
    writer.write(raw_chat(b"{"))
    writer.write_eof()
    assert b"HTTP/1.1 400" in await reader.read()
    writer.close()


async def test_one_connection_carries_requests_of_all_kinds(gateway: Gateway) -> None:
    """Heads repeat, differ, and arrive in pieces or together, with and without ASGI."""
    gateway.use_vllm()
    host, port = gateway.client.base_url.host, gateway.client.base_url.port
    reader, writer = await asyncio.open_connection(host, port)

    def chat(text: str, *more: str) -> bytes:
        body = json.dumps(chat_body(text)).encode()
        lines = ["POST /v1/chat/completions HTTP/1.1", "host: x", f"authorization: Bearer {KEY}", *more]
        return "\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body

    async def response() -> tuple[int, bytes]:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        assert length is not None
        return int(head.split()[1]), await reader.readexactly(int(length[1]))

    for text in ("hello", "hello", "big:100000", "status:400", "hello"):
        writer.write(chat(text))
        assert (await response())[0] == (400 if text == "status:400" else 200)
    writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
    assert (await response())[0] == 200
    whole = chat("hello")
    for piece in (whole[:40], whole[40:-5], whole[-5:]):
        writer.write(piece)
        await asyncio.sleep(0.02)
    assert (await response())[0] == 200
    writer.write(chat("hello") * 3 + b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n" + chat("hello", "x-request-id: mine"))
    assert [(await response())[0] for _ in range(5)] == [200] * 5
    writer.write(chat("hello").replace(KEY.encode(), b"sk-wrong"))
    assert (await response())[0] == 401
    writer.write(chat("hello", "expect: 100-continue"))
    assert b" 100 " in await reader.readuntil(b"\r\n\r\n")
    assert (await response())[0] == 200
    writer.write(chat("hello") + chat("hello", "connection: close"))
    assert [(await response())[0] for _ in range(2)] == [200, 200]
    assert await reader.read() == b""
    writer.close()


async def test_body_limit_holds_for_announced_and_for_chunked_bodies(run_dir: RunDir, engine_socket: Path) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b"x" * 1000

    config = make_config(run_dir, server=ServerConfig(run_dir=str(run_dir.path), max_body_bytes=2048))
    async with run_gateway(run_dir, engine_socket, config) as gateway:
        announced = await gateway.client.post("/v1/chat/completions", content=b"x" * 5000)
        counted = await gateway.client.post("/v1/chat/completions", content=pieces())
    assert (announced.status_code, counted.status_code) == (413, 413)
    assert announced.json()["error"]["code"] == "request_too_large"


async def test_compressed_bodies_are_refused(gateway: Gateway) -> None:
    response = await gateway.client.post("/v1/chat/completions", content=b"x", headers={"content-encoding": "gzip"})
    assert response.status_code == 400


async def test_wrong_methods_and_unknown_paths_are_named(gateway: Gateway) -> None:
    wrong = await gateway.client.get("/v1/chat/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST, OPTIONS")
    assert wrong.json()["error"]["code"] == "method_not_allowed"
    wrong = await gateway.client.post("/v1/models")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET")
    unknown = await gateway.client.get("/v1/nothing")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "unknown_url")
    assert (await gateway.client.options("/v1/chat/completions")).headers["allow"] == "POST, OPTIONS"
    head = await gateway.client.head("/health")
    assert (head.status_code, head.content) == (200, b"")


async def test_request_id_of_the_client_is_kept_if_it_is_valid(gateway: Gateway) -> None:
    for sent, kept in (("abc-123", True), ("x" * 129, False), ("a b", False)):
        response = await gateway.client.get("/health", headers={"x-request-id": sent})
        assert (response.headers["x-request-id"] == sent) is kept


async def test_cors_is_off_unless_configured(gateway: Gateway, run_dir: RunDir, engine_socket: Path) -> None:
    preflight = {"origin": "https://ui.test", "access-control-request-method": "POST", "authorization": ""}
    assert (await gateway.client.options("/v1/chat/completions", headers=preflight)).status_code == 401
    server = ServerConfig(run_dir=str(run_dir.path), cors_origins=["https://ui.test"])
    async with run_gateway(run_dir, engine_socket, make_config(run_dir, server=server)) as open_gateway:
        response = await open_gateway.client.options("/v1/chat/completions", headers=preflight)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "https://ui.test"
        response = await open_gateway.client.get("/v1/models", headers={"origin": "https://evil.test"})
        assert "access-control-allow-origin" not in response.headers
        response = await open_gateway.client.post(
            "/v1/chat/completions", json=chat_body("hello", stream=True), headers={"origin": "https://ui.test"}
        )
        assert response.headers["access-control-allow-origin"] == "https://ui.test"
        assert events(response.text)[-1] == "[DONE]"

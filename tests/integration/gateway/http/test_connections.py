"""HTTP connections to a worker: heads, order, limits, headers, CORS."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from llm_api_server.config.models import ServerConfig
from llm_api_server.gateway.http.body_limit import MAX_BYTES
from llm_api_server.gateway.http.fast_path import MAX_HEAD_BYTES, HttpProtocol
from llm_api_server.ipc.run_dir import RunDir
from tests.gateway_worker import CHAT_KEY, KEY, Gateway, both_ways, chat_body, events, make_config, run_gateway

pytestmark = pytest.mark.anyio

PLAIN = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


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


@both_ways
async def test_compressed_bodies_are_refused_and_uncompressed_ones_are_not(gateway: Gateway) -> None:
    body = json.dumps(chat_body("hello")).encode()
    for path in ("/v1/chat/completions", "/v1/embeddings", "/auth/token", "/admin/api/keys"):
        response = await gateway.client.post(path, content=b"x", headers={"content-encoding": "gzip"})
        assert response.status_code == 400
        assert "send the body uncompressed" in response.json()["error"]["message"]
    for encoding in ("Identity", "IDENTITY", "", "identity"):
        response = await gateway.client.post(
            "/v1/chat/completions", content=body, headers={"content-encoding": encoding}
        )
        assert response.status_code == 200


@both_ways
async def test_byte_order_mark_before_a_body_is_skipped(gateway: Gateway) -> None:
    mark = b"\xef\xbb\xbf"
    long = json.dumps(chat_body("a" * 20_000, max_tokens=1)).encode()
    for path, body, status in (
        ("/v1/chat/completions", json.dumps(chat_body("hello")).encode(), 200),
        ("/v1/chat/completions", long, 200),
        ("/v1/completions", b'{"model": "m", "prompt": "hello"}', 200),
        ("/v1/embeddings", b'{"model": "m", "input": "a"}', 200),
        ("/auth/token", b'{"expires_in": 60}', 400),  # tokens are off
    ):
        headers = {"content-type": "application/json"}
        response = await gateway.client.post(path, content=mark + body, headers=headers)
        plain = await gateway.client.post(path, content=body, headers=headers)
        assert (response.status_code, plain.status_code) == (status, status), response.text
        if status >= 400:
            assert response.json() == plain.json()
    assert all(mark.decode() not in line for line in gateway.engine_log())


@both_ways
async def test_wrong_base_urls_are_answered_with_the_right_url(gateway: Gateway) -> None:
    url = f"{gateway.client.base_url}"
    for method, path, right in (
        ("POST", "//v1/chat/completions", "/v1/chat/completions"),
        ("POST", "/v1/v1/messages", "/v1/messages"),
        ("POST", "/chat/completions", "/v1/chat/completions"),
        ("POST", "/v1/embeddings/", "/v1/embeddings"),
        ("GET", "/models", "/v1/models"),
        ("GET", "/v1/models/", "/v1/models"),
        ("GET", "/v1/models/m/", "/v1/models/m"),
        ("GET", "/v1/v1/models/m", "/v1/models/m"),
        ("GET", "/health/", "/health"),
    ):
        response = await gateway.client.request(method, f"{url}{path}", content=b"{}" if method == "POST" else None)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (404, "unknown_url"), path
        assert f"{method} {path}. Did you mean {right}?" in error["message"]
    response = await gateway.client.post(f"{url}/chat/completions", content=b"x" * (MAX_BYTES + 1))
    assert (response.status_code, response.json()["error"]["code"]) == (404, "unknown_url")
    assert (await gateway.client.post("/auth/token", content=b"x" * (MAX_BYTES + 1))).status_code == 413


def unfinished(path: str, key: str, *lines: str) -> bytes:
    """Return a request of 5,000 bytes of which one has arrived."""
    head = [f"POST {path} HTTP/1.1", "host: x", f"authorization: Bearer {key}", *lines]
    framing = [] if any("chunked" in line for line in lines) else ["content-length: 5000"]
    return "\r\n".join([*head, *framing, "", "{" if framing else "5\r\n{"]).encode()


SLOW_PATHS = ["/v1/chat/completions", "/v1/messages", "/v1/audio/transcriptions", "/auth/token", "/chat/completions"]


@both_ways
@pytest.mark.parametrize("path", SLOW_PATHS)
async def test_wrong_key_is_refused_before_the_body_is_there(gateway: Gateway, path: str) -> None:
    for first in (b"", PLAIN, raw_chat(b"{")):
        for lines in ([], ["transfer-encoding: chunked"]):
            reader, writer = await asyncio.open_connection(gateway.client.base_url.host, gateway.client.base_url.port)
            writer.write(first + unfinished(path, "sk-wrong", *lines))
            if first:
                await reader.readuntil(b"}")
            assert b" 401 " in await reader.readline()
            writer.close()


@both_ways
async def test_connection_goes_on_if_the_body_follows_its_refusal(gateway: Gateway) -> None:
    reader, writer = await asyncio.open_connection(gateway.client.base_url.host, gateway.client.base_url.port)
    writer.write(unfinished("/v1/chat/completions", "sk-wrong"))
    assert b" 401 " in await reader.readline()
    await reader.readuntil(b"}}")
    writer.write(b" " * 4999 + PLAIN)
    assert b" 200 " in await reader.readline()
    writer.close()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/auth/token"])
async def test_connection_of_a_refused_body_that_goes_on_for_ever_is_closed(gateway: Gateway, path: str) -> None:
    gateway.server.config.timeout_keep_alive = 0.3  # type: ignore[assignment] # whole seconds by its declaration
    reader, writer = await asyncio.open_connection(gateway.client.base_url.host, gateway.client.base_url.port)
    writer.write(unfinished(path, "sk-wrong"))
    assert b" 401 " in await reader.readline()
    end = asyncio.create_task(reader.read())
    while not end.done():
        writer.write(b" ")
        await asyncio.sleep(0.02)
    writer.close()


@pytest.mark.parametrize("http", [HttpProtocol, HttpToolsProtocol], ids=["direct", "asgi"])
async def test_body_without_progress_gets_408_and_a_slow_one_does_not(
    run_dir: RunDir, engine_socket: Path, http: type[HttpToolsProtocol]
) -> None:
    async with run_gateway(run_dir, engine_socket, make_config(run_dir), http, body_timeout=0.3) as gateway:

        async def status(path: str, *lines: str) -> bytes:
            host, port = gateway.client.base_url.host, gateway.client.base_url.port
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(unfinished(path, KEY, *lines))
            response = await reader.read()
            writer.close()
            assert b"connection: close\r\n" in response
            assert response.count(b"connection: ") == 1
            assert b"No more of the request body arrived within 0.3 seconds" in response
            return response[9:12]

        async def slowly() -> AsyncIterator[bytes]:
            body = json.dumps(chat_body("hello")).encode()
            for start in range(0, len(body), len(body) // 8):
                yield body[start : start + len(body) // 8]
                await asyncio.sleep(0.1)

        cases = [(path, *lines) for path in SLOW_PATHS for lines in ([], ["transfer-encoding: chunked"])]
        slow = asyncio.create_task(gateway.client.post("/v1/chat/completions", content=slowly()))
        assert await asyncio.gather(*(status(*case) for case in cases)) == [b"408"] * len(cases)
        assert (await slow).status_code == 200


@both_ways
async def test_no_response_may_be_sniffed(gateway: Gateway) -> None:
    for method, path in (
        ("GET", "/admin/api/models"),
        ("GET", "/admin/api/nothing"),
        ("POST", "/admin/api/models"),
        ("GET", "/console"),
        ("GET", "/docs"),
        ("GET", "/v1/models"),
        ("GET", "/v1/chat/completions"),
        ("POST", "/v1/chat/completions"),
    ):
        for key in (KEY, "sk-wrong"):
            headers = {"authorization": f"Bearer {key}"}
            response = await gateway.client.request(method, path, headers=headers)
            assert response.headers.get_list("x-content-type-options") == ["nosniff"], (path, response.status_code)


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


@pytest.mark.parametrize("http", [HttpProtocol, HttpToolsProtocol], ids=["direct", "asgi"])
@pytest.mark.parametrize("allowed", ["https://ui.test", "*"])
async def test_pages_of_other_origins_can_read_every_error(
    run_dir: RunDir, engine_socket: Path, http: type[HttpToolsProtocol], allowed: str
) -> None:
    server = ServerConfig(run_dir=str(run_dir.path), cors_origins=[allowed], max_body_bytes=6000)
    config = make_config(run_dir, server=server)
    async with run_gateway(run_dir, engine_socket, config, http, body_timeout=0.1) as gateway:

        async def check(status: int, method: str, path: str, key: str = KEY, content: bytes = b"{}") -> None:
            headers = {"origin": "https://ui.test", "authorization": f"Bearer {key}"}
            response = await gateway.client.request(method, path, headers=headers, content=content)
            assert (response.status_code, response.headers["access-control-allow-origin"]) == (status, allowed), path
            assert "x-request-id" in response.headers
            assert "x-request-id" in response.headers["access-control-expose-headers"]

        await check(401, "POST", "/v1/chat/completions", key="sk-wrong")
        await check(401, "GET", "/v1/models", key="sk-wrong")
        await check(403, "POST", "/v1/embeddings", key=CHAT_KEY)
        await check(400, "POST", "/v1/chat/completions")
        await check(404, "GET", "/models")
        await check(404, "POST", "/v1/chat/completions", content=json.dumps({**chat_body("a"), "model": "x"}).encode())
        await check(405, "PATCH", "/v1/chat/completions")
        await check(405, "POST", "/v1/models")
        await check(413, "POST", "/v1/chat/completions", content=b"x" * 8000)
        await check(413, "POST", "/auth/token", content=b"x" * (MAX_BYTES + 1))
        await check(503, "POST", "/v1/chat/completions", content=json.dumps(chat_body("a", model="org/gone")).encode())
        host, port = gateway.client.base_url.host, gateway.client.base_url.port
        for path in SLOW_PATHS:
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(unfinished(path, KEY, "origin: https://ui.test"))
            response = await reader.read()
            assert response.startswith(b"HTTP/1.1 408")
            assert f"access-control-allow-origin: {allowed}\r\n".encode() in response
            writer.close()

"""Remotes that send what is no response, and exceptions while an exchange ends, as clients see them."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from llm_api_server.gateway.metering.access_log import AccessLog
from llm_api_server.gateway.metering.completion import RequestCompletion
from llm_api_server.gateway.metering.request_record import RequestRecord
from llm_api_server.gateway.metering.usage_reporter import UsageReporter
from llm_api_server.gateway.proxy import client_response
from llm_api_server.gateway.proxy.client_response import ClientResponse
from llm_api_server.gateway.proxy.engine_request import EngineRequest
from llm_api_server.gateway.proxy.forwarding import Forwarder
from llm_api_server.gateway.proxy.preparation import Preparation
from llm_api_server.gateway.proxy.relay import Relay
from llm_api_server.http_client.connection import Connection
from llm_api_server.ipc.lease_messages import InstanceInfo
from llm_api_server.ipc.run_dir import RunDir
from tests.gateway_worker import Gateway, make_config, run_gateway
from tests.waiting import until

pytestmark = pytest.mark.anyio
GOOD = json.dumps(
    {"choices": [{"message": {"content": "hi"}}], "usage": {"prompt_tokens": "3", "completion_tokens": 4.0}}
)
CHUNK = 'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":"a"}}]}'


class OddRemote:
    """Sends `response`, whatever is asked, and closes the connection."""

    response = b""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        assert "accept-encoding: identity" in head
        await reader.readexactly(int(head.split("content-length:")[1].split("\r\n")[0]))
        writer.write(self.response)
        writer.close()

    def answer(self, body: bytes | str, kind: str = "application/json", status: int = 200, **headers: str) -> None:
        raw = body.encode() if isinstance(body, str) else body
        lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(raw)}\r\n{lines}\r\n"
        self.response = head.encode() + raw


@pytest.fixture
async def remote(run_dir: RunDir, gateway: Gateway) -> AsyncIterator[OddRemote]:
    odd = OddRemote()
    path = run_dir.path / "odd.sock"
    async with await asyncio.start_unix_server(odd.serve, path):
        gateway.manager.instances["m"] = InstanceInfo("m-1", "m", "remote", f"unix:{path}")
        yield odd


async def is_released(gateway: Gateway) -> None:
    await until(lambda: not any(held.in_flight for held in gateway.leases._held.values()), timeout=10)


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_no_completion_is_a_bad_gateway(gateway: Gateway, remote: OddRemote, stream: bool) -> None:
    for body, kind, words in [
        ('{"error":{"message":"boom"}}', "application/json", "boom"),
        ('[{"error":{"message":"boom"}}]', "application/json", "boom"),
        ('{"success":false,"errors":[{"message":"boom"}]}', "application/json", "boom"),
        ("null", "application/json", "null"), ("[]", "application/json", "list"), ("", "application/json", "empty"),
        ("<!doctype html><p>Log in", "text/html", "HTML"),
        ('{"choices":[]}', "application/json", "instead of an event stream" if stream else "without choices"),
        ("", "text/event-stream", "middle"), ("data: [DONE]\n\n", "text/event-stream", "middle"),
    ]:  # fmt: skip
        remote.answer(body, kind)
        response = await gateway.chat(stream=stream)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (502, "engine_error")
        assert words in error["message"]
        assert words in ("boom", "middle") or "'m'" in error["message"]
    await is_released(gateway)


@pytest.mark.parametrize("status", [204, 301, 302, 307, 308])
async def test_redirects_and_nothing_are_bad_gateways(gateway: Gateway, remote: OddRemote, status: int) -> None:
    remote.answer("", status=status, location="https://elsewhere.test/")
    response = await gateway.chat()
    assert response.status_code == 502
    assert str(status) in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
async def test_a_stream_that_ends_early_ends_with_an_error_event(
    gateway: Gateway, remote: OddRemote, path: str
) -> None:
    event = '{"type":"response.output_text.delta","sequence_number":4,"delta":"a"}'
    remote.answer(f"{CHUNK}\n\n" if path.endswith("completions") else f"data: {event}\n\n", "text/event-stream")
    body = {"model": "m", "stream": True, "max_tokens": 5, "messages": [{"role": "user", "content": "x"}], "input": "x"}
    text = (await gateway.client.post(path, json=body)).text
    last = json.loads(text.strip().split("data: ")[-1])
    assert last.get("error") or last["sequence_number"] == 5


@pytest.mark.parametrize(("coding", "encode"), [("gzip", gzip.compress), ("x-gzip", gzip.compress),
                                                ("deflate", zlib.compress)])  # fmt: skip
async def test_compressed_responses_are_decoded(gateway: Gateway, remote: OddRemote, coding: str, encode: Any) -> None:
    remote.answer(encode(GOOD.encode()), content_encoding=coding)
    response = await gateway.chat()
    assert response.json() == json.loads(GOOD)
    assert "content-encoding" not in response.headers
    remote.answer(encode(f"{CHUNK}\r\rdata: [DONE]".encode()), "text/event-stream", content_encoding=coding)
    assert (await gateway.chat(stream=True)).text == f"{CHUNK}\n\ndata: [DONE]\n\n"


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, br"])
async def test_other_codings_are_bad_gateways(gateway: Gateway, remote: OddRemote, coding: str) -> None:
    remote.answer(b"\x8b\x01", content_encoding=coding)
    response = await gateway.chat()
    assert response.status_code == 502
    assert coding in response.json()["error"]["message"]
    remote.answer(b"\x8b\x01", status=429, content_encoding=coding, retry_after="9")
    response = await gateway.chat()
    assert (response.status_code, response.headers["retry-after"]) == (429, "9")


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("value", ["inf", "Infinity", "1e999", "nan", "1e300"])
async def test_any_retry_after_is_answered(gateway: Gateway, remote: OddRemote, status: int, value: str) -> None:
    remote.answer('{"error":{"message":"later"}}', status=status, retry_after=value)
    response = await gateway.chat()
    assert response.status_code == status
    assert int(response.headers.get("retry-after", "1")) <= 86_400
    await is_released(gateway)


STEPS = [
    (client_response, "error_response"), (client_response, "common_header_lines"), (ClientResponse, "fail"),
    (ClientResponse, "write"), (Relay, "detach"), (EngineRequest, "response"), (Connection, "abort_for"),
    (RequestRecord, "usage_or_estimate"), (RequestCompletion, "finish"), (UsageReporter, "end"), (AccessLog, "add"),
    (Preparation, "add_rate_limits"), (Forwarder, "abort"),
]  # fmt: skip


@pytest.mark.parametrize(("owner", "name"), STEPS, ids=[name for _, name in STEPS])
@pytest.mark.parametrize("text", ["hello", "stream", "die-mid", "status:500", "die", "leave"])
async def test_an_exception_while_an_exchange_ends_leaves_nothing_behind(
    run_dir: RunDir, engine_socket: Any, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, text: str
) -> None:
    async with run_gateway(run_dir, engine_socket, make_config(run_dir)) as gateway:
        original = getattr(owner, name)

        def fail(*_: Any, **__: Any) -> Any:
            monkeypatch.setattr(owner, name, original)
            raise RuntimeError(name)

        monkeypatch.setattr(owner, name, fail)
        try:
            if text == "leave":
                async with asyncio.timeout(0.3):
                    await gateway.chat("silent")
            else:
                await gateway.chat(text, stream=text in ("stream", "die-mid"))
        except (httpx.RemoteProtocolError, TimeoutError):
            pass
        await is_released(gateway)
        monkeypatch.setattr(owner, name, original)
        assert (await gateway.chat()).status_code == 200

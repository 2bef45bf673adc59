"""The API worker on a real socket between real clients, a fake engine process and a fake manager."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import struct
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from llm_api_server.auth.access import Key, digest
from llm_api_server.config.models import (
    ApiKeyConfig,
    AuthConfig,
    Config,
    InferenceConfig,
    ModelConfig,
    ModelsConfig,
    ServerConfig,
)
from llm_api_server.gateway import app as gateway_app
from llm_api_server.gateway.http.fast_path import MAX_HEAD_BYTES, HttpProtocol
from llm_api_server.gateway.manager_link.leases import Leases
from llm_api_server.gateway.manager_link.link import ManagerLink
from llm_api_server.gateway.proxy import services as proxy_module
from llm_api_server.http_client.client import HttpClient
from llm_api_server.ipc import lease_messages
from llm_api_server.ipc import messages as control
from llm_api_server.ipc.lease_messages import InstanceInfo
from llm_api_server.ipc.model_status import ModelStatus
from llm_api_server.ipc.run_dir import RunDir
from llm_api_server.types import ModelState
from tests.fake_manager import FakeManager
from tests.pictures import data_url, image_part, png
from tests.web import PICTURE, Web, make_certificate, ok

pytestmark = pytest.mark.anyio

KEY = "sk-test-0123456789abcdef"
CHAT_KEY = "sk-chat-0123456789abcdef"
EVERY_FIELD = {"message", "type", "param", "code"}
PNG = data_url(png())


@dataclass
class Gateway:
    """One running worker and what stands around it."""

    client: httpx.AsyncClient
    manager: FakeManager
    engine_socket: Path
    leases: Leases
    server: uvicorn.Server

    def engine_log(self) -> list[str]:
        log = Path(f"{self.engine_socket}.log")
        return log.read_text().splitlines() if log.exists() else []

    def use_vllm(self) -> None:
        """Let the engine of `m` count as vLLM, whose plain requests stay plain."""
        self.manager.instances["m"] = InstanceInfo("m-1", "m", "vllm", f"unix:{self.engine_socket}")

    def engine_bodies(self) -> list[dict[str, Any]]:
        return [json.loads(line.split(" ", 2)[2]) for line in self.engine_log() if line.startswith("/")]

    def open_gate(self, count: int) -> None:
        Path(f"{self.engine_socket}.go").write_text(str(count))

    async def chat(self, text: str = "hello", **more: Any) -> httpx.Response:
        return await self.client.post("/v1/chat/completions", json=chat_body(text, **more))

    def stream(self, text: str = "hello", **more: Any) -> contextlib.AbstractAsyncContextManager[httpx.Response]:
        return self.client.stream("POST", "/v1/chat/completions", json=chat_body(text, stream=True, **more))


def chat_body(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what must come; the test's time limit is the only clock."""
    while not condition():
        await asyncio.sleep(0.01)


@pytest.fixture
def run_dir() -> Iterator[RunDir]:
    """Short enough for unix socket paths."""
    with tempfile.TemporaryDirectory(prefix="gw-") as path:
        yield RunDir(Path(path))


@pytest.fixture
async def engine_socket(run_dir: RunDir) -> AsyncIterator[Path]:
    path = run_dir.path / "engine.sock"
    script = Path(__file__).parents[1] / "fake_engine.py"
    process = await asyncio.create_subprocess_exec(sys.executable, str(script), str(path))
    await until(path.exists)
    yield path
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()


def make_config(run_dir: RunDir, **sections: Any) -> Config:
    return Config(
        server=sections.pop("server", ServerConfig(run_dir=str(run_dir.path))),
        auth=AuthConfig(
            api_keys=[
                ApiKeyConfig(key=KEY, name="all"),
                ApiKeyConfig(key=CHAT_KEY, name="chat", permissions=["chat"], models=["m*"]),
            ]
        ),
        models=ModelsConfig(
            default="m",
            available={
                "m": ModelConfig(path="m.gguf", aliases=["gpt-4o"], adapters={"org/lora": "lora"}),
                "org/blind": ModelConfig(path="b.gguf"),
                "org/gone": ModelConfig(path="g.gguf"),
            },
        ),
        **sections,
    )


def make_manager(run_dir: RunDir, engine_socket: Path) -> FakeManager:
    def status(name: str, **more: Any) -> ModelStatus:
        return ModelStatus(name, ModelState.READY, "llama_cpp", f"{name}.gguf", **more)

    def instance(name: str, address: str) -> InstanceInfo:
        return InstanceInfo(f"{name}-1", name, "llama_cpp", address, context_length=2000)

    models = [
        status("m", aliases=["gpt-4o"], adapters=["org/lora"], context_length=2000),
        status("org/blind", vision=False),
        status("org/gone"),
    ]
    instances = {
        "m": instance("m", f"unix:{engine_socket}"),
        "org/blind": instance("org/blind", f"unix:{engine_socket}"),
        "org/gone": instance("org/gone", "unix:/nonexistent/engine.sock"),
    }
    return FakeManager(run_dir, models, instances)


@contextlib.asynccontextmanager
async def running(
    run_dir: RunDir, engine_socket: Path, config: Config, http: type[HttpToolsProtocol] = HttpProtocol
) -> AsyncIterator[Gateway]:
    manager = make_manager(run_dir, engine_socket)
    await manager.start()
    leases = Leases(ManagerLink(run_dir, start_manager=lambda _: None))
    listener = socket.create_server(("127.0.0.1", 0))
    app = gateway_app.build_app(config, leases, HttpClient())
    server = uvicorn.Server(
        uvicorn.Config(app, http=http, log_config=None, access_log=False, timeout_graceful_shutdown=1)
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    headers = {"authorization": f"Bearer {KEY}"}
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=30) as client:
            await until(lambda: server.started and len(leases.models) > 0)
            yield Gateway(client, manager, engine_socket, leases, server)
    finally:
        server.should_exit = True
        await serving
        await manager.stop()


@pytest.fixture
async def gateway(run_dir: RunDir, engine_socket: Path, request: pytest.FixtureRequest) -> AsyncIterator[Gateway]:
    http = getattr(request, "param", HttpProtocol)
    async with running(run_dir, engine_socket, make_config(run_dir), http) as one:
        yield one


#: Past ASGI, and by ASGI: as another server would.
both_ways = pytest.mark.parametrize("gateway", [HttpProtocol, HttpToolsProtocol], indirect=True, ids=["direct", "asgi"])


@pytest.fixture
def fast_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy_module, "FIRST_PING_DELAY", 0.05)
    monkeypatch.setattr(proxy_module, "PING_INTERVAL", 0.05)


def events(text: str) -> list[Any]:
    payloads = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [payload if payload == "[DONE]" else json.loads(payload) for payload in payloads]


def content_of(found: list[Any]) -> str:
    chunks = [event for event in found if isinstance(event, dict) and event.get("choices")]
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


# ── answers ──


@pytest.mark.parametrize("first", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /he"])
async def test_who_sends_no_whole_head_is_sent_away(gateway: Gateway, first: bytes) -> None:
    """After as long as an idle connection lasts, here a moment: nothing came, half a head, half a second head."""
    gateway.server.config.timeout_keep_alive = 0.3  # type: ignore[assignment] # whole seconds by its declaration
    reader, writer = await asyncio.open_connection(gateway.client.base_url.host, gateway.client.base_url.port)
    writer.write(first)
    answer = await reader.read()
    assert answer.count(b"HTTP/1.1 200") == first.count(b"\r\n\r\n")
    writer.close()


async def test_an_endless_head_is_refused_and_a_long_one_is_not(gateway: Gateway) -> None:
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


async def test_requests_that_come_together_are_answered_in_their_order(gateway: Gateway) -> None:
    """Some at once, some by an engine, one by a route; the last one closes the connection."""
    good = json.dumps({"messages": [{"role": "user", "content": "hello"}]}).encode()
    get = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    requests = [raw_chat(b"{"), get, raw_chat(good), raw_chat(b'{"model":"no"}'), raw_chat(good), get]
    reader, writer = await asyncio.open_connection(gateway.client.base_url.host, gateway.client.base_url.port)
    for _ in range(2):
        writer.write(b"".join(requests))
        answer = b""
        while answer.count(b"HTTP/1.1 ") < len(requests) or not answer.endswith(b"}"):
            answer += await reader.read(65536)
        assert [int(status) for status in re.findall(rb"HTTP/1.1 (\d+) ", answer)] == [400, 200, 200, 400, 200, 200]
    writer.write(raw_chat(b"{") + raw_chat(b"{", b"connection: close"))
    assert (await reader.read()).count(b"HTTP/1.1 400") == 2
    writer.close()


async def test_who_closes_its_half_is_still_answered_what_is_known_at_once(gateway: Gateway) -> None:
    reader, writer = await asyncio.open_connection(gateway.client.base_url.host, gateway.client.base_url.port)
    writer.write(raw_chat(b"{"))
    writer.write_eof()
    assert b"HTTP/1.1 400" in await reader.read()
    writer.close()


@both_ways
async def test_json_answer_passes_verbatim(gateway: Gateway) -> None:
    answer = await gateway.chat()
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == "Hello there!"
    assert answer.json()["usage"] == {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
    assert answer.headers["x-request-id"].startswith("req_")
    assert int(answer.headers["openai-processing-ms"]) >= 0


async def test_stream_has_all_chunks_and_done_and_no_usage_unless_asked(gateway: Gateway) -> None:
    answer = await gateway.chat(stream=True)
    found = events(answer.text)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert content_of(found) == "Hello there!"
    assert found[-1] == "[DONE]"
    assert all(event == "[DONE]" or event["choices"] for event in found)
    assert gateway.engine_bodies()[-1]["stream_options"] == {"include_usage": True}


async def test_usage_chunk_is_shown_when_asked_for(gateway: Gateway) -> None:
    found = events((await gateway.chat(stream=True, stream_options={"include_usage": True})).text)
    assert found[-2]["choices"] == []
    assert found[-2]["usage"]["total_tokens"] == 12


@both_ways
async def test_events_cut_across_packets_arrive_whole_and_usage_stays_hidden(gateway: Gateway) -> None:
    found = events((await gateway.chat("split", stream=True)).text)
    assert content_of(found) == "Hello there!"
    assert found[-1] == "[DONE]"
    assert "usage" not in found[-2]


@both_ways
async def test_each_chunk_is_relayed_when_it_comes(gateway: Gateway) -> None:
    """The engine sends piece N+1 only after the client has read piece N: any buffering would hang."""
    seen: list[str] = []
    gateway.open_gate(1)
    async with gateway.stream("chunks:5") as answer:
        async for line in answer.aiter_lines():
            if '"content"' in line:
                seen.append(json.loads(line.removeprefix("data: "))["choices"][0]["delta"]["content"])
                gateway.open_gate(len(seen) + 1)
    assert seen == ["0", "1", "2", "3", "4"]


@both_ways
async def test_large_json_answer_passes_whole(gateway: Gateway) -> None:
    answer = await gateway.chat("big:3000000")
    assert len(answer.json()["text"]) == 3_000_000


async def test_alias_and_absent_model_reach_the_engine_under_its_own_name(gateway: Gateway) -> None:
    gateway.use_vllm()
    for body in ({"model": "gpt-4o"}, {}):
        answer = await gateway.client.post(
            "/v1/chat/completions", json={**body, "messages": [{"role": "user", "content": "hello"}]}
        )
        assert answer.json()["model"] == "m"
    assert [body["model"] for body in gateway.engine_bodies()] == ["m", "m"]


async def test_an_adapter_is_asked_for_by_name_on_its_models_instance(gateway: Gateway) -> None:
    gateway.use_vllm()
    answers = [await gateway.chat(model=name) for name in ("org/lora", "m")]
    assert [answer.json()["model"] for answer in answers] == ["org/lora", "m"]
    assert [body["model"] for body in gateway.engine_bodies()] == ["org/lora", "m"]
    assert {acquire.model for acquire in gateway.manager.heard_of(lease_messages.Acquire)} == {"m"}
    answer = await gateway.client.post(
        "/v1/audio/transcriptions", files={"file": ("a.wav", b"RIFF")}, data={"model": "org/lora"}
    )
    assert answer.status_code == 200
    assert "org/lora" in "\n".join(gateway.engine_log()).rpartition("/v1/audio/transcriptions")[2]


async def test_an_adapter_does_not_embed_the_message_says_what_does(gateway: Gateway) -> None:
    answer = await gateway.client.post("/v1/embeddings", json={"model": "org/lora", "input": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "not_supported")
    assert "ask 'm' for this" in answer.json()["error"]["message"]
    assert gateway.engine_bodies() == []


async def test_an_adapter_is_a_model_with_a_parent(gateway: Gateway) -> None:
    one = (await gateway.client.get("/v1/models/org/lora")).json()
    assert (one["id"], one["parent"], one["status"], one["aliases"]) == ("org/lora", "m", "ready", [])
    assert (await gateway.client.get("/v1/models/m")).json()["parent"] is None
    assert (await gateway.client.get("/admin/api/models/org/lora")).json()["adapters"] == ["org/lora"]
    assert (await gateway.client.post("/admin/api/models/org/lora/load")).json()["id"] == "m"
    gateway.client.headers["authorization"] = f"Bearer {CHAT_KEY}"
    assert [model["id"] for model in (await gateway.client.get("/v1/models")).json()["data"]] == ["m"]
    assert (await gateway.client.get("/v1/models/org/lora")).status_code == 404
    assert (await gateway.chat(model="org/lora")).status_code == 403


async def test_a_plain_answer_of_llama_cpp_is_made_from_a_stream(gateway: Gateway) -> None:
    """Only a stream's end stops llama.cpp at once when the client leaves."""
    answer = await gateway.chat("hello")
    assert gateway.engine_bodies()[-1]["stream"] is True
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["choices"][0]["message"]["content"]
    assert answer.json()["usage"]["total_tokens"] == 12


async def test_body_that_needs_no_change_is_forwarded_byte_for_byte(gateway: Gateway) -> None:
    gateway.use_vllm()
    body = b'{ "model":"m",  "messages" : [{"role":"user","content":"\\u00e9 hello"}], "x-new": [1.50, {"a" :null}]}'
    answer = await gateway.client.post("/v1/chat/completions", content=body)
    assert answer.status_code == 200
    assert gateway.engine_log()[-1].split(" ", 2)[2] == body.decode()


async def test_developer_messages_become_system_messages(gateway: Gateway) -> None:
    messages = [{"role": "developer", "content": "be brief", "name": "x"}, {"role": "user", "content": "hello"}]
    assert (await gateway.client.post("/v1/chat/completions", json={"messages": messages})).status_code == 200
    assert gateway.engine_bodies()[-1]["messages"] == [{**messages[0], "role": "system"}, messages[1]]


async def test_streaming_default_needs_a_client_that_accepts_streams(run_dir: RunDir, engine_socket: Path) -> None:
    config = make_config(run_dir, inference=InferenceConfig(streaming_default=True))
    async with running(run_dir, engine_socket, config) as gateway:
        plain = await gateway.chat()
        accepting = await gateway.client.post(
            "/v1/chat/completions", json=chat_body("hello"), headers={"accept": "text/event-stream"}
        )
        refusing = await gateway.client.post(
            "/v1/chat/completions", json=chat_body("hello", stream=False), headers={"accept": "text/event-stream"}
        )
    assert plain.headers["content-type"] == "application/json"
    assert accepting.headers["content-type"].startswith("text/event-stream")
    assert refusing.headers["content-type"] == "application/json"


# ── clients that leave ──


@both_ways
async def test_client_that_leaves_a_stream_stops_the_engine(gateway: Gateway) -> None:
    gateway.open_gate(1)
    async with gateway.stream("chunks:100") as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data:"):
                break
    await until(lambda: "aborted" in gateway.engine_log())
    await until(lambda: bool(gateway.manager.heard_of(lease_messages.ReturnSlots)))


@both_ways
async def test_client_that_leaves_before_a_json_answer_stops_the_engine(gateway: Gateway) -> None:
    waiting = asyncio.create_task(gateway.chat("silent"))
    await until(lambda: len(gateway.engine_log()) == 1)
    waiting.cancel()
    await until(lambda: "aborted" in gateway.engine_log())
    await until(lambda: bool(gateway.manager.heard_of(lease_messages.ReturnSlots)))


@both_ways
async def test_client_that_leaves_the_queue_is_cancelled_there(gateway: Gateway) -> None:
    gateway.manager.hold = True
    waiting = asyncio.create_task(gateway.chat())
    await until(lambda: bool(gateway.manager.heard_of(lease_messages.Acquire)))
    waiting.cancel()
    await until(lambda: bool(gateway.manager.heard_of(lease_messages.Cancel)))
    assert gateway.engine_log() == []


@both_ways
async def test_slow_client_slows_the_engine_down(gateway: Gateway) -> None:
    """64 MiB are on offer; unread, only what buffers on the way hold may leave the engine."""
    sent = Path(f"{gateway.engine_socket}.sent")
    count = 4096
    async with gateway.stream(f"flood:{count}") as answer:
        lines = answer.aiter_lines()
        await anext(lines)
        await until(sent.exists)
        before = -1
        while (now := int(sent.read_text() or 0)) != before or not now:
            before = now
            await asyncio.sleep(0.3)
        assert 0 < now < count / 2
        received = 0
        async for line in lines:
            received += line.startswith("data: {")
    assert received > count - 3


# ── streams that wait, and failures ──


@pytest.mark.usefixtures("fast_pings")
async def test_stream_that_waits_for_a_load_gets_comments_then_its_answer(run_dir: RunDir, engine_socket: Path) -> None:
    async with running(run_dir, engine_socket, make_config(run_dir)) as gateway:
        gateway.manager.hold = True
        async with gateway.stream() as answer:
            lines = answer.aiter_lines()
            assert answer.status_code == 200
            assert [await anext(lines) for _ in range(4)] == [": waiting for m", "", ": waiting for m", ""]
            gateway.manager.grant_all()
            rest = "\n".join([line async for line in lines])
    assert content_of(events(rest)) == "Hello there!"


@pytest.mark.usefixtures("fast_pings")
async def test_stream_that_waits_for_its_first_token_gets_comments(run_dir: RunDir, engine_socket: Path) -> None:
    async with (
        running(run_dir, engine_socket, make_config(run_dir)) as gateway,
        gateway.stream("head-only") as answer,
    ):
        assert await anext(answer.aiter_lines()) == ": waiting for m"


@pytest.mark.usefixtures("fast_pings")
async def test_failed_load_after_a_comment_is_an_error_event(run_dir: RunDir, engine_socket: Path) -> None:
    async with running(run_dir, engine_socket, make_config(run_dir)) as gateway:
        gateway.manager.hold = True
        async with gateway.stream() as answer:
            lines = answer.aiter_lines()
            await anext(lines)
            request = gateway.manager.heard_of(lease_messages.Acquire)[0].request
            for client in gateway.manager._clients:
                client.send(control.Refused(request, "model_load_failed", "the file is cut off"))
            found = events("\n".join([line async for line in lines]))
    assert found == [
        {
            "error": {
                "message": "the file is cut off",
                "type": "service_unavailable_error",
                "param": None,
                "code": "model_load_failed",
            }
        }
    ]


@both_ways
async def test_refused_load_is_answered_with_its_reason(gateway: Gateway) -> None:
    gateway.manager.refusal = lambda request: control.Refused(request, "model_load_failed", "no room", retry_after=7.2)
    answer = await gateway.chat()
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "8"
    assert answer.json()["error"]["code"] == "model_load_failed"


@both_ways
async def test_engine_that_dies_in_a_stream_ends_it_with_an_error_event(gateway: Gateway) -> None:
    found = events((await gateway.chat("die-mid", stream=True)).text)
    assert content_of(found) == "Hello"
    assert set(found[-1]["error"]) == EVERY_FIELD
    assert found[-1]["error"]["code"] == "engine_error"


@both_ways
async def test_an_error_event_before_anything_else_is_a_response(gateway: Gateway) -> None:
    """vLLM's way to refuse a schema in a stream."""
    answer = await gateway.chat("error-first", stream=True)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "Grammar error: no")


async def test_engines_error_event_is_translated_and_ends_the_stream(gateway: Gateway) -> None:
    text = (await gateway.chat("error-event", stream=True)).text
    error = events(text)[-1]["error"]
    assert "[DONE]" not in text
    assert set(error) == EVERY_FIELD
    assert error["code"] == "engine_error"
    assert "/opt/" not in error["message"]


async def test_anthropic_streams_fail_in_their_own_form(gateway: Gateway) -> None:
    body = {"model": "m", "max_tokens": 5, "stream": True, "messages": [{"role": "user", "content": "die-mid"}]}
    text = (await gateway.client.post("/v1/messages", json=body)).text
    assert text.rstrip().split("\n")[-2] == "event: error"
    assert events(text)[-1]["type"] == "error"


async def test_responses_streams_fail_in_their_own_form(gateway: Gateway) -> None:
    body = {"model": "m", "stream": True, "input": "die-mid"}
    assert events((await gateway.client.post("/v1/responses", json=body)).text)[-1]["type"] == "error"


@both_ways
async def test_engine_that_gives_no_answer_is_tried_twice_then_unavailable(gateway: Gateway) -> None:
    answer = await gateway.chat("die")
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "engine_unavailable"
    assert len(gateway.engine_log()) == 2
    assert len(gateway.manager.heard_of(lease_messages.Acquire)) == 2


async def test_instance_that_cannot_be_reached_is_unavailable(gateway: Gateway) -> None:
    answer = await gateway.chat(model="org/gone")
    assert answer.status_code == 503
    assert "nonexistent" not in answer.text


async def test_instance_that_moved_is_found_at_the_second_try(gateway: Gateway) -> None:
    gone = gateway.manager.instances["org/gone"]
    asked: list[int] = []
    grant_all = gateway.manager.grant_all

    def grant() -> None:
        asked.append(1)
        if len(asked) == 2:
            gateway.manager.instances["org/gone"] = InstanceInfo(
                "org/gone-2", "org/gone", "llama_cpp", f"unix:{gateway.engine_socket}"
            )
        grant_all()

    gateway.manager.grant_all = grant  # type: ignore[method-assign]
    assert (await gateway.chat(model="org/gone")).status_code == 200
    assert gone.id in [release.instance for release in gateway.manager.heard_of(lease_messages.ReturnSlots)]


async def test_timeout_covers_the_queue_and_says_what_was_waited_for(run_dir: RunDir, engine_socket: Path) -> None:
    config = make_config(run_dir, server=ServerConfig(run_dir=str(run_dir.path), timeout=0.2))
    async with running(run_dir, engine_socket, config) as gateway:
        gateway.manager.hold = True
        queued = await gateway.chat()
        gateway.manager.hold = False
        running_ = await gateway.chat("silent")
        await until(lambda: "aborted" in gateway.engine_log())
        streaming = events((await gateway.chat("head-only", stream=True)).text or "data: {}")
    assert (queued.status_code, running_.status_code) == (503, 504)
    assert queued.json()["error"]["code"] == "server_overloaded"
    assert int(queued.headers["retry-after"]) >= 1
    assert running_.json()["error"]["code"] == "timeout"
    assert gateway.manager.heard_of(lease_messages.Cancel)
    assert streaming is not None


@pytest.mark.usefixtures("fast_pings")
async def test_timeout_of_a_started_stream_is_an_error_event(run_dir: RunDir, engine_socket: Path) -> None:
    config = make_config(run_dir, server=ServerConfig(run_dir=str(run_dir.path), timeout=0.4))
    async with running(run_dir, engine_socket, config) as gateway:
        found = events((await gateway.chat("head-only", stream=True)).text)
    assert found[-1]["error"]["code"] == "timeout"


async def test_client_that_does_not_read_is_given_up_at_the_timeout(run_dir: RunDir, engine_socket: Path) -> None:
    config = make_config(run_dir, server=ServerConfig(run_dir=str(run_dir.path), timeout=0.5))
    async with running(run_dir, engine_socket, config) as gateway, gateway.stream("flood:4096") as answer:
        assert answer.status_code == 200
        await until(lambda: "aborted" in gateway.engine_log())
        await until(lambda: bool(gateway.manager.heard_of(lease_messages.ReturnSlots)))


@both_ways
async def test_stream_that_outlasts_the_drain_time_ends_with_an_error_event(gateway: Gateway) -> None:
    gateway.open_gate(1)
    async with gateway.stream("chunks:2") as answer:
        lines = answer.aiter_lines()
        await anext(lines)
        gateway.server.should_exit = True
        found = events("\n".join([line async for line in lines]))
    assert found[-1]["error"]["code"] == "server_shutting_down"


@pytest.mark.parametrize(
    ("engine_status", "status", "code"),
    [(400, 400, None), (401, 500, "engine_error"), (404, 400, "not_supported"), (429, 429, "rate_limit_exceeded"),
     (500, 500, "engine_error"), (501, 400, "not_supported"), (503, 503, "engine_unavailable")],
)  # fmt: skip
async def test_engine_errors_are_translated(
    gateway: Gateway, engine_status: int, status: int, code: str | None
) -> None:
    answer = await gateway.chat(f"status:{engine_status}")
    error = answer.json()["error"]
    assert answer.status_code == status
    assert set(error) == EVERY_FIELD
    assert error["code"] == code
    assert "/home/" not in answer.text


# ── connections and leases ──


async def test_connections_to_the_engine_are_reused(gateway: Gateway) -> None:
    for _ in range(5):
        assert (await gateway.chat(stream=True)).status_code == 200
    assert {line.split(" ")[1] for line in gateway.engine_log()} == {"1"}


async def test_connection_that_the_engine_closed_is_replaced(gateway: Gateway) -> None:
    for _ in range(4):
        assert (await gateway.chat("close-after")).status_code == 200
    assert [line.split(" ")[1] for line in gateway.engine_log()] == ["1", "2", "3", "4"]


async def test_traffic_in_flight_costs_one_lease(gateway: Gateway) -> None:
    gateway.open_gate(1)
    async with gateway.stream("chunks:2") as answer:
        lines = answer.aiter_lines()
        await anext(lines)
        for _ in range(3):
            await gateway.chat()
        assert len(gateway.manager.heard_of(lease_messages.Acquire)) == 1
        gateway.open_gate(2)
        assert "data: [DONE]" in [line async for line in lines]
    await until(lambda: bool(gateway.manager.heard_of(lease_messages.ReturnSlots)))
    assert gateway.manager.heard_of(lease_messages.ReturnSlots) == [lease_messages.ReturnSlots("m-1", 1000)]


async def test_nothing_starts_on_a_draining_instance(gateway: Gateway) -> None:
    gateway.open_gate(1)
    async with gateway.stream("chunks:2") as answer:
        lines = answer.aiter_lines()
        await anext(lines)
        gateway.manager.reclaim("m-1")
        gateway.manager.push_models()
        before = gateway.leases.models
        await until(lambda: gateway.leases.models is not before)
        await gateway.chat()
        gateway.open_gate(2)
        assert "data: [DONE]" in [line async for line in lines]
    await until(lambda: len(gateway.manager.heard_of(lease_messages.ReturnSlots)) == 2)
    assert len(gateway.manager.heard_of(lease_messages.Acquire)) == 2
    assert [one.slots for one in gateway.manager.heard_of(lease_messages.ReturnSlots)] == [999, 1001]


async def test_streams_outlive_the_manager_and_a_new_one_learns_of_them(gateway: Gateway) -> None:
    gateway.open_gate(1)
    async with gateway.stream("chunks:3") as answer:
        lines = answer.aiter_lines()
        await anext(lines)
        await gateway.manager.stop()
        await until(lambda: not gateway.leases.link.is_connected)
        assert (await gateway.client.get("/readyz")).status_code == 503
        assert (await gateway.client.get("/livez")).status_code == 200
        waiting = asyncio.create_task(gateway.chat(model="org/blind"))
        await gateway.manager.start()
        assert (await waiting).status_code == 200
        assert gateway.manager.heard_of(control.Hello)[-1].in_flight == {"m-1": 1}
        gateway.open_gate(3)
        assert "data: [DONE]" in [line async for line in lines]


# ── who may what ──


async def test_everything_but_the_public_paths_needs_a_key(gateway: Gateway) -> None:
    document = (await gateway.client.get("/openapi.json")).json()
    public = {"/", "/health", "/livez", "/readyz", "/docs", "/openapi.json"}
    for path in {*document["paths"], "/nothing", "/v1/models/x/y", "/admin/api/models", "/metrics"} - public:
        for method in ("GET", "POST", "OPTIONS"):
            answer = await gateway.client.request(method, path, headers={"authorization": ""})
            assert answer.status_code == 401, (method, path)
            assert answer.headers["www-authenticate"].startswith("Bearer")
            assert answer.headers["x-request-id"]
    for path in public:
        assert (await gateway.client.get(path, headers={"authorization": ""})).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{"authorization": "Bearer sk-wrong"}, {"authorization": "Bearer \xff"}, {"authorization": "Basic abc"},
     {"authorization": "Bearer a.b.c"}, {"x-api-key": "sk-wrong", "authorization": ""}],
)  # fmt: skip
async def test_wrong_keys_are_401(gateway: Gateway, headers: dict[str, str]) -> None:
    raw = {name: value.encode("latin-1") for name, value in headers.items()}
    answer = await gateway.client.get("/v1/models", headers=raw)  # type: ignore[arg-type]
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"


async def test_key_as_anthropic_clients_send_it(gateway: Gateway) -> None:
    headers = {"x-api-key": KEY, "authorization": ""}
    assert (await gateway.client.get("/v1/models", headers=headers)).status_code == 200


async def test_errors_under_messages_have_anthropics_form(gateway: Gateway) -> None:
    answer = await gateway.client.post("/v1/messages", headers={"authorization": ""}, json={})
    assert answer.status_code == 401
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == "authentication_error"
    answer = await gateway.client.post("/v1/messages", json={"model": "m", "messages": []})
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_permissions_and_models_of_a_key(gateway: Gateway) -> None:
    gateway.client.headers["authorization"] = f"Bearer {CHAT_KEY}"
    assert (await gateway.chat()).status_code == 200
    refused = await gateway.client.post("/v1/completions", json={"model": "m", "prompt": "x"})
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "permission_denied"
    assert (await gateway.chat(model="org/blind")).status_code == 403
    assert (await gateway.chat(model="nope")).status_code == 404
    assert (await gateway.client.get("/admin/api/models")).status_code == 403
    listed = (await gateway.client.get("/v1/models")).json()
    assert [model["id"] for model in listed["data"]] == ["m"]
    assert (await gateway.client.get("/v1/models/org/blind")).status_code == 404


# ── requests that are wrong ──

USER = {"role": "user", "content": "hi"}
CHAT = "/v1/chat/completions"
SCHEMALESS = {"type": "json_schema"}
WRONG: list[tuple[str, Any, int, str | None]] = [
    (CHAT, b"{", 400, None),
    (CHAT, b"", 400, None),
    (CHAT, b"[]", 400, None),
    (CHAT, b'"x"', 400, None),
    (CHAT, b'{"messages":[{"role":"user","content":"\xff"}]}', 400, None),
    (CHAT, b'{"messages":[{"role":"user","content":"\\ud800"}]}', 400, None),
    (CHAT, b'{"messages":[{"role":"user","content":"x"}],"temperature":NaN}', 400, None),
    (CHAT, b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, None),
    (CHAT, {}, 400, "messages"),
    (CHAT, {"messages": []}, 400, "messages"),
    (CHAT, {"messages": "x"}, 400, "messages"),
    (CHAT, {"messages": [1]}, 400, "messages[0]"),
    (CHAT, {"messages": [{"content": "x"}]}, 400, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "messages[0].content[0].text"),
    (CHAT, {"messages": [USER], "model": 5}, 400, "model"),
    (CHAT, {"messages": [USER], "model": ""}, 400, "model"),
    (CHAT, {"messages": [USER], "model": "nope"}, 404, "model"),
    (CHAT, {"messages": [USER], "stream": "yes"}, 400, "stream"),
    (CHAT, {"messages": [USER], "stream_options": {"include_usage": True}}, 400, "stream_options"),
    (CHAT, {"messages": [USER], "temperature": "hot"}, 400, "temperature"),
    (CHAT, {"messages": [USER], "temperature": 9}, 400, "temperature"),
    (CHAT, {"messages": [USER], "top_p": 2}, 400, "top_p"),
    (CHAT, {"messages": [USER], "n": 0}, 400, "n"),
    (CHAT, {"messages": [USER], "max_tokens": -1}, 400, "max_tokens"),
    (CHAT, {"messages": [USER], "max_tokens": 10**30}, 400, "max_tokens"),
    (CHAT, {"messages": [USER], "seed": "x"}, 400, "seed"),
    (CHAT, {"messages": [USER], "stop": 5}, 400, "stop"),
    (CHAT, {"messages": [USER], "logit_bias": "x"}, 400, "logit_bias"),
    (CHAT, {"messages": [USER], "top_logprobs": 2}, 400, "top_logprobs"),
    (CHAT, {"messages": [USER], "tools": "x"}, 400, "tools"),
    (CHAT, {"messages": [USER], "tools": [{"type": "function"}]}, 400, "tools[0].function"),
    (CHAT, {"messages": [USER], "tool_choice": "bogus"}, 400, "tool_choice"),
    (CHAT, {"messages": [USER], "tool_choice": "required"}, 400, "tool_choice"),
    (CHAT, {"messages": [USER], "response_format": "json"}, 400, "response_format"),
    (CHAT, {"messages": [USER], "response_format": SCHEMALESS}, 400, "response_format.json_schema"),
    (CHAT, {"messages": [USER], "response_format": {**SCHEMALESS, "json_schema": {}}}, 400,
     "response_format.json_schema.schema"),
    ("/v1/completions", {}, 400, "prompt"),
    ("/v1/completions", {"prompt": []}, 400, "prompt"),
    ("/v1/completions", {"prompt": 5}, 400, "prompt"),
    ("/v1/completions", {"prompt": "x", "echo": True}, 400, "echo"),
    ("/v1/embeddings", {}, 400, "input"),
    ("/v1/embeddings", {"input": ""}, 400, "input"),
    ("/v1/embeddings", {"input": []}, 400, "input"),
    ("/v1/embeddings", {"input": ["a", ""]}, 400, "input"),
    ("/v1/embeddings", {"input": ["a"] * 2049}, 400, "input"),
    ("/v1/embeddings", {"input": "x", "encoding_format": "zip"}, 400, "encoding_format"),
    ("/v1/embeddings", {"input": "x", "dimensions": 8}, 400, "dimensions"),
    ("/v1/responses", {}, 400, "input"),
    ("/v1/responses", {"input": "x", "previous_response_id": "resp_1"}, 400, "previous_response_id"),
    ("/v1/rerank", {"query": "x"}, 400, "documents"),
    ("/v1/score", {"text_1": "x"}, 400, "text_2"),
    ("/pooling", {"input": []}, 400, "input"),
    ("/classify", {}, 400, "input"),
    ("/tokenize", {}, 400, "prompt"),
    ("/detokenize", {"tokens": ["x"]}, 400, "tokens[0]"),
    ("/v1/audio/transcriptions", {"file": "x"}, 400, None),
]  # fmt: skip


async def test_wrong_requests_are_the_clients_fault_and_never_reach_the_engine(gateway: Gateway) -> None:
    for path, body, status, param in WRONG:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = await gateway.client.post(path, content=content)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (status, param), (path, content[:200], answer.text)
        assert set(error) == EVERY_FIELD
    assert gateway.engine_log() == []


async def test_a_model_without_a_chat_template_completes_only(gateway: Gateway) -> None:
    gateway.leases.models["m"].chat_template = False
    messages = [{"role": "user", "content": "hi"}]
    for path, body in (
        ("/v1/chat/completions", {"messages": messages}),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/messages", {"messages": messages, "max_tokens": 5}),
    ):
        answer = await gateway.client.post(path, json=body)
        assert answer.status_code == 400, path
        assert "models.available.NAME.engine_args: {chat_template: FILE}" in answer.json()["error"]["message"]
    assert gateway.engine_log() == []
    assert (await gateway.client.post("/v1/completions", json={"prompt": "hi"})).status_code == 200


async def test_pictures(gateway: Gateway) -> None:
    async def ask(url: str, model: str = "m") -> httpx.Response:
        parts = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": url}}]
        return await gateway.client.post(
            "/v1/chat/completions", json={"model": model, "messages": [{"role": "user", "content": parts}]}
        )

    assert (await ask(PNG)).status_code == 200
    blind = await ask(PNG, "org/blind")
    assert (blind.status_code, blind.json()["error"]["param"]) == (400, "messages[0].content[1].image_url.url")
    for url in ("http://169.254.169.254/x", "https://x.test/a.png", "file:///etc/passwd", "data:image/png;base64,AAAA",
                "data:image/png;base64,%%%", "data:image/png,xx", "HTTP://x.test/"):  # fmt: skip
        assert (await ask(url)).status_code == 400, url
    assert len(gateway.engine_log()) == 1


async def test_pictures_by_url_reach_the_engine_as_data(
    run_dir: RunDir, engine_socket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web = Web(make_certificate(tmp_path))
    await web.start()
    monkeypatch.setattr(proxy_module, "MediaFetcher", lambda _: web.fetcher(max_bytes=10_000))
    web.answers["/large.png"] = [ok(PICTURE + bytes(20_000))]
    async with running(run_dir, engine_socket, make_config(run_dir)) as gateway:

        async def ask(*urls: str, **more: Any) -> httpx.Response:
            parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
            body = {"model": "m", "messages": [{"role": "user", "content": parts}], **more}
            return await gateway.client.post("/v1/chat/completions", json=body)

        seen = web.url("/a.png")
        assert (await ask(seen, PNG, seen)).status_code == 200
        streamed = await ask(seen, stream=True)
        refused = [await ask(seen, url) for url in (web.url("/no.png"), web.url("/large.png"), "http://a.example.com/")]
        blind = await ask(seen, model="org/blind")
        bodies = gateway.engine_bodies()
    await web.stop()
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert [answer.status_code for answer in (*refused, blind)] == [400] * 4
    assert {answer.json()["error"]["param"] for answer in refused} == {"messages[0].content[1].image_url.url"}
    assert len(web.asked) == 6  # each picture of a request once, and none for a model that sees nothing
    urls = [[part["image_url"]["url"] for part in body["messages"][0]["content"]] for body in bodies]
    assert urls == [[data_url(PICTURE), PNG, data_url(PICTURE)], [data_url(PICTURE)]]


@pytest.mark.parametrize(
    ("sides", "status"), [([100], 200), ([101], 400), ([60, 60], 200), ([60, 60, 60], 400), ([30_000], 400)]
)
async def test_pictures_may_not_be_too_large_once_decoded(
    run_dir: RunDir, engine_socket: Path, sides: list[int], status: int
) -> None:
    config = make_config(run_dir, inference=InferenceConfig(max_image_pixels=10_000))
    pictures = [png()[:16] + struct.pack(">II", side, side) + png()[24:] for side in sides]
    body = {"model": "m", "messages": [{"role": "user", "content": [image_part(picture) for picture in pictures]}]}
    async with running(run_dir, engine_socket, config) as gateway:
        answer = await gateway.client.post("/v1/chat/completions", json=body)
        reached = len(gateway.engine_log())
    assert (answer.status_code, reached) == (status, int(status == 200))
    if status == 400:
        error = answer.json()["error"]
        assert "10,000 pixels" in error["message"]
        assert error["param"] == f"messages[0].content[{len(sides) - 1}].image_url.url"


async def test_context_limits_are_counted_by_the_engines_tokenizer(run_dir: RunDir, engine_socket: Path) -> None:
    config = make_config(run_dir, inference=InferenceConfig(max_input_tokens=600))
    async with running(run_dir, engine_socket, config) as gateway:
        fits = await gateway.chat("word " * 500)
        too_long = await gateway.chat("word " * 700)
        no_room = await gateway.chat("word " * 500, max_tokens=1600)
        prompt = await gateway.client.post("/v1/completions", json={"model": "m", "prompt": "word " * 601})
    assert fits.status_code == 200
    for answer in (too_long, no_room, prompt):
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert "703" in too_long.json()["error"]["message"]
    assert re.search(r"2000.*2103 tokens \(503 in the messages, 1600", no_room.json()["error"]["message"])
    assert "601" in prompt.json()["error"]["message"]


async def test_body_limit_by_header_and_by_counting(run_dir: RunDir, engine_socket: Path) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b"x" * 1000

    config = make_config(run_dir, server=ServerConfig(run_dir=str(run_dir.path), max_body_bytes=2048))
    async with running(run_dir, engine_socket, config) as gateway:
        announced = await gateway.client.post("/v1/chat/completions", content=b"x" * 5000)
        counted = await gateway.client.post("/v1/chat/completions", content=pieces())
    assert (announced.status_code, counted.status_code) == (413, 413)
    assert announced.json()["error"]["code"] == "request_too_large"


async def test_compressed_bodies_are_refused(gateway: Gateway) -> None:
    answer = await gateway.client.post("/v1/chat/completions", content=b"x", headers={"content-encoding": "gzip"})
    assert answer.status_code == 400


async def test_methods_and_unknown_paths(gateway: Gateway) -> None:
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


# ── tokens, and what a request needs of a model ──


@pytest.mark.parametrize(("words", "status"), [(2000, 200), (2001, 400)])
async def test_an_input_to_embed_may_fill_the_context(gateway: Gateway, words: int, status: int) -> None:
    answer = await gateway.client.post("/v1/embeddings", json={"model": "m", "input": "x " * words})
    assert answer.status_code == status


async def test_llama_cpps_tokens_come_in_vllms_form(gateway: Gateway) -> None:
    for path in ("/tokenize", "/v1/tokenize"):
        for name in ("prompt", "content"):
            answer = await gateway.client.post(path, json={"model": "gpt-4o", name: "one two"})
            assert answer.json() == {"count": 2, "max_model_len": 2000, "tokens": [0, 1], "token_strs": None}
    asked = gateway.engine_bodies()[0]
    assert asked == {"content": "one two", "add_special": True, "parse_special": True, "with_pieces": False}
    answer = await gateway.client.post("/detokenize", json={"model": "m", "tokens": [7, 8]})
    assert answer.json() == {"prompt": "7 8"}


async def test_token_strings_and_special_tokens_on_llama_cpp(gateway: Gateway) -> None:
    body = {"model": "m", "prompt": "é two", "return_token_strs": True, "add_special_tokens": False}
    answer = (await gateway.client.post("/tokenize", json=body)).json()
    assert (answer["tokens"], answer["token_strs"]) == ([0, 1], ["\ufffd", "two"])
    assert gateway.engine_bodies()[0]["add_special"] is False


async def test_llama_cpp_splits_a_conversation_as_its_template_puts_it(gateway: Gateway) -> None:
    messages = [{"role": "user", "content": "x y"}]
    body = {"model": "gpt-4o", "messages": messages, "tools": [], "add_special_tokens": False}
    answer = await gateway.client.post("/tokenize", json=body)
    assert answer.json()["count"] == 5
    rendered, split = gateway.engine_bodies()
    assert rendered == {"model": "m", "messages": messages, "tools": [], "add_special_tokens": False}
    assert (split["content"], split["add_special"]) == ("a b c x y", True)


async def test_vllms_tokens_pass_as_they_are(gateway: Gateway) -> None:
    gateway.use_vllm()
    body = {"model": "m", "content": "one two", "add_special_tokens": False}
    assert (await gateway.client.post("/v1/tokenize", json=body)).status_code == 200
    assert gateway.engine_bodies() == [{"model": "m", "prompt": "one two", "add_special_tokens": False}]
    assert gateway.engine_log()[0].startswith("/tokenize ")


NEEDS = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}, "generate"),
    ("/v1/completions", {"prompt": "x"}, "generate"),
    ("/v1/responses", {"input": "x"}, "generate"),
    ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}, "generate"),
    ("/v1/embeddings", {"input": "x"}, "embed"),
    ("/rerank", {"query": "x", "documents": ["y"]}, "rank"),
    ("/v1/rerank", {"query": "x", "documents": ["y"]}, "rank"),
    ("/v2/rerank", {"query": "x", "documents": ["y"]}, "rank"),
    ("/score", {"text_1": "x", "text_2": "y"}, "score"),
    ("/v1/score", {"text_1": "x", "text_2": "y"}, "score"),
    ("/classify", {"input": "x"}, "classify"),
    ("/pooling", {"input": "x"}, "pool"),
    ("/tokenize", {"prompt": "x"}, None),
]


@pytest.mark.parametrize(("path", "body", "task"), NEEDS)
async def test_the_manager_hears_what_a_request_needs(
    gateway: Gateway, path: str, body: dict[str, Any], task: str | None
) -> None:
    gateway.manager.refusal = lambda request: control.Refused(request, "not_supported", "m does other things")
    answer = await gateway.client.post(path, json={"model": "m", **body})
    assert (answer.status_code, "m does other things" in answer.text) == (400, True)
    assert [(one.model, one.task) for one in gateway.manager.heard_of(lease_messages.Acquire)] == [("m", task)]


async def test_a_twin_is_no_model_of_its_own_to_clients(gateway: Gateway) -> None:
    twin = "m (embeddings)"
    gateway.manager.models[0].tasks = ("generate", "embed")
    gateway.manager.models.append(ModelStatus(twin, ModelState.READY, "vllm", "m", tasks=("embed",), twin_of="m"))
    gateway.manager.push_models()
    await until(lambda: twin in gateway.leases.models)
    listed = (await gateway.client.get("/v1/models")).json()["data"]
    assert twin not in {model["id"] for model in listed}
    assert {model["id"]: model["tasks"] for model in listed}["m"] == ["generate", "embed"]
    assert (await gateway.chat(model=twin)).status_code == 404
    admin = {model["id"]: model for model in (await gateway.client.get("/admin/api/models")).json()["data"]}
    assert (admin[twin]["twin_of"], admin["m"]["twin_of"]) == ("m", None)


# ── the rest of the API ──


async def test_request_id_of_the_client_is_kept_when_it_is_sane(gateway: Gateway) -> None:
    for sent, kept in (("abc-123", True), ("x" * 129, False), ("a b", False)):
        answer = await gateway.client.get("/health", headers={"x-request-id": sent})
        assert (answer.headers["x-request-id"] == sent) is kept


async def test_models_list_and_one_by_name_and_alias(gateway: Gateway) -> None:
    listed = (await gateway.client.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["m", "org/lora", "org/blind", "org/gone"]
    assert {"id", "object", "created", "owned_by"} <= set(listed["data"][0])
    assert listed["data"][0]["status"] == "ready"
    assert listed["data"][0]["context_length"] == 2000
    assert (await gateway.client.get("/v1/models/gpt-4o")).json()["id"] == "m"
    assert (await gateway.client.get("/v1/models/org/blind")).json()["id"] == "org/blind"
    assert (await gateway.client.get("/v1/models/org%2Fblind")).json()["id"] == "org/blind"
    assert (await gateway.client.get("/v1/models/nope")).json()["error"]["code"] == "model_not_found"


async def test_admin_loads_and_unloads(gateway: Gateway) -> None:
    listed = (await gateway.client.get("/admin/api/models")).json()["data"]
    assert {"id", "state", "pid", "memory_bytes", "in_flight", "last_used"} <= set(listed[0])
    assert (await gateway.client.post("/admin/api/models/org/blind/load")).json()["id"] == "org/blind"
    assert (await gateway.client.post("/admin/api/models/org%2Fblind/unload?wait=false")).status_code == 200
    assert gateway.manager.heard_of(control.LoadModel)[0].model == "org/blind"
    assert gateway.manager.heard_of(control.UnloadModel)[0].wait is False
    assert (await gateway.client.get("/admin/api/models/org/blind")).json()["id"] == "org/blind"
    assert (await gateway.client.post("/admin/api/models/nope/load")).status_code == 404
    invalid = await gateway.client.post("/admin/api/models/m/load?wait=perhaps")
    assert (invalid.status_code, invalid.json()["error"]["param"]) == (400, "wait")
    gateway.manager.refusal = lambda request: control.Refused(request, "model_load_failed", "no room")
    assert (await gateway.client.post("/admin/api/models/m/load")).status_code == 503


async def test_transcription_form_reaches_the_engine_with_the_models_own_name(gateway: Gateway) -> None:
    answer = await gateway.client.post(
        "/v1/audio/transcriptions",
        data={"model": "gpt-4o", "language": "en"},
        files={"file": ("a.wav", b"RIFF\x00\xff")},
    )
    assert answer.status_code == 200
    log = Path(f"{gateway.engine_socket}.log").read_text()
    assert "gpt-4o" not in log
    assert re.search(r'name="model"\s+m\s', log)
    missing = await gateway.client.post("/v1/audio/transcriptions", data={"model": "m"}, files={"x": b""})
    assert missing.json()["error"]["param"] == "file"


async def test_description_names_every_endpoint_and_its_errors(gateway: Gateway) -> None:
    document = (await gateway.client.get("/openapi.json")).json()
    chat = document["paths"]["/v1/chat/completions"]["post"]
    schema = document["components"]["schemas"]["ChatRequest"]
    assert schema["required"] == ["messages"]
    assert {"model", "messages", "stream", "max_tokens", "tools"} <= set(schema["properties"])
    assert chat["responses"]["400"]["content"]["application/json"]["schema"]["$ref"].endswith("/Error")
    assert "422" not in json.dumps(document)
    names = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)))
    assert names <= set(document["components"]["schemas"])
    assert "/docs" not in document["paths"]
    assert "http" not in (await gateway.client.get("/docs")).text.replace("<http", "")


async def test_cors_is_off_unless_configured(gateway: Gateway, run_dir: RunDir, engine_socket: Path) -> None:
    preflight = {"origin": "https://ui.test", "access-control-request-method": "POST", "authorization": ""}
    assert (await gateway.client.options("/v1/chat/completions", headers=preflight)).status_code == 401
    server = ServerConfig(run_dir=str(run_dir.path), cors_origins=["https://ui.test"])
    async with running(run_dir, engine_socket, make_config(run_dir, server=server)) as open_gateway:
        answer = await open_gateway.client.options("/v1/chat/completions", headers=preflight)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://ui.test"
        answer = await open_gateway.client.get("/v1/models", headers={"origin": "https://evil.test"})
        assert "access-control-allow-origin" not in answer.headers
        answer = await open_gateway.client.post(
            "/v1/chat/completions", json=chat_body("hello", stream=True), headers={"origin": "https://ui.test"}
        )
        assert answer.headers["access-control-allow-origin"] == "https://ui.test"
        assert events(answer.text)[-1] == "[DONE]"


async def test_one_connection_carries_requests_of_all_kinds(gateway: Gateway) -> None:
    """Heads that repeat, that differ, that come in pieces and that come together, past ASGI and by it."""
    gateway.use_vllm()
    host, port = gateway.client.base_url.host, gateway.client.base_url.port
    reader, writer = await asyncio.open_connection(host, port)

    def chat(text: str, *more: str) -> bytes:
        body = json.dumps(chat_body(text)).encode()
        lines = ["POST /v1/chat/completions HTTP/1.1", "host: x", f"authorization: Bearer {KEY}", *more]
        return "\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body

    async def answer() -> tuple[int, bytes]:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        assert length is not None
        return int(head.split()[1]), await reader.readexactly(int(length[1]))

    for text in ("hello", "hello", "big:100000", "status:400", "hello"):
        writer.write(chat(text))
        assert (await answer())[0] == (400 if text == "status:400" else 200)
    writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
    assert (await answer())[0] == 200
    whole = chat("hello")
    for piece in (whole[:40], whole[40:-5], whole[-5:]):
        writer.write(piece)
        await asyncio.sleep(0.02)
    assert (await answer())[0] == 200
    writer.write(chat("hello") * 3 + b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n" + chat("hello", "x-request-id: mine"))
    assert [(await answer())[0] for _ in range(5)] == [200] * 5
    writer.write(chat("hello").replace(KEY.encode(), b"sk-wrong"))
    assert (await answer())[0] == 401
    writer.write(chat("hello", "expect: 100-continue"))
    assert b" 100 " in await reader.readuntil(b"\r\n\r\n")
    assert (await answer())[0] == 200
    writer.write(chat("hello") + chat("hello", "connection: close"))
    assert [(await answer())[0] for _ in range(2)] == [200, 200]
    assert await reader.read() == b""
    writer.close()


async def test_a_key_is_looked_at_again_when_keys_have_changed(gateway: Gateway) -> None:
    gateway.manager.keys = {digest("sk-of-the-store"): Key("bob", "id-of-bob", frozenset({"chat"}))}
    gateway.client.headers["authorization"] = "Bearer sk-of-the-store"
    for _ in range(3):
        assert (await gateway.chat()).status_code == 200
    assert len(gateway.manager.heard_of(control.FindKey)) == 1
    gateway.manager.keys = {}
    gateway.manager.change_keys(["id-of-bob"])
    answer = await gateway.chat()
    while answer.status_code == 200:  # the message is under way
        answer = await gateway.chat()
    assert answer.status_code == 401


async def test_token_stands_for_its_key_with_fewer_rights(run_dir: RunDir, engine_socket: Path) -> None:
    config = make_config(run_dir)
    auth = config.auth.model_copy(update={"secret_key": "0123456789abcdef" * 3, "tokens": True})
    async with running(run_dir, engine_socket, config.model_copy(update={"auth": auth})) as gateway:
        issued = await gateway.client.post("/auth/token", json={"permissions": ["chat"], "expires_in": 60})
        assert (issued.status_code, issued.json()["token_type"]) == (200, "bearer")
        assert 0 < issued.json()["expires_in"] <= 60
        wider = await gateway.client.post("/auth/token", json={"permissions": ["everything"]})
        assert (wider.status_code, wider.json()["error"]["param"]) == (400, "permissions")
        wrong = await gateway.client.post("/auth/token", json={"expires_in": "soon"})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "expires_in")
        gateway.client.headers["authorization"] = f"Bearer {issued.json()['access_token']}"
        assert (await gateway.chat()).status_code == 200
        assert (await gateway.client.post("/v1/completions", json={"prompt": "x"})).status_code == 403
        assert (await gateway.client.post("/auth/token")).status_code == 403


async def test_tokens_that_are_off_say_so(gateway: Gateway) -> None:
    answer = await gateway.client.post("/auth/token")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "not_supported")

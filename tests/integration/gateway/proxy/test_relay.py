"""Responses of an engine on their way to the client: verbatim, chunk by chunk, under the model's own name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from llm_api_server.config.models import InferenceConfig
from llm_api_server.ipc import lease_messages
from llm_api_server.ipc import messages as control
from llm_api_server.ipc.run_dir import RunDir
from tests.gateway_worker import Gateway, both_ways, chat_body, content_of, events, make_config, run_gateway

pytestmark = pytest.mark.anyio


@both_ways
async def test_json_response_passes_verbatim(gateway: Gateway) -> None:
    response = await gateway.chat()
    assert response.status_code == 200
    assert response.json()["choices"][0]["message"]["content"] == "Hello there!"
    assert response.json()["usage"] == {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
    assert response.headers["x-request-id"].startswith("req_")
    assert int(response.headers["openai-processing-ms"]) >= 0


async def test_stream_has_all_chunks_and_no_usage_unless_requested(gateway: Gateway) -> None:
    response = await gateway.chat(stream=True)
    found = events(response.text)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert content_of(found) == "Hello there!"
    assert found[-1] == "[DONE]"
    assert all(event == "[DONE]" or event["choices"] for event in found)
    assert gateway.engine_bodies()[-1]["stream_options"] == {"include_usage": True}


async def test_usage_chunk_is_sent_if_requested(gateway: Gateway) -> None:
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
async def test_each_chunk_is_relayed_at_once(gateway: Gateway) -> None:
    """The engine sends piece N+1 only after the client has read piece N: any buffering would hang."""
    seen: list[str] = []
    gateway.open_gate(1)
    async with gateway.stream("chunks:5") as response:
        async for line in response.aiter_lines():
            if '"content"' in line:
                seen.append(json.loads(line.removeprefix("data: "))["choices"][0]["delta"]["content"])
                gateway.open_gate(len(seen) + 1)
    assert seen == ["0", "1", "2", "3", "4"]


@both_ways
async def test_large_json_response_passes_whole(gateway: Gateway) -> None:
    response = await gateway.chat("big:3000000")
    assert len(response.json()["text"]) == 3_000_000


async def test_alias_and_absent_model_reach_the_engine_under_the_models_name(gateway: Gateway) -> None:
    gateway.use_vllm()
    for body in ({"model": "gpt-4o"}, {}):
        response = await gateway.client.post(
            "/v1/chat/completions", json={**body, "messages": [{"role": "user", "content": "hello"}]}
        )
        assert response.json()["model"] == "m"
    assert [body["model"] for body in gateway.engine_bodies()] == ["m", "m"]


async def test_adapter_is_requested_by_name_from_its_models_instance(gateway: Gateway) -> None:
    gateway.use_vllm()
    responses = [await gateway.chat(model=name) for name in ("org/lora", "m")]
    assert [response.json()["model"] for response in responses] == ["org/lora", "m"]
    assert [body["model"] for body in gateway.engine_bodies()] == ["org/lora", "m"]
    assert {acquire.model for acquire in gateway.manager.received_of(lease_messages.Acquire)} == {"m"}
    response = await gateway.client.post(
        "/v1/audio/transcriptions", files={"file": ("a.wav", b"RIFF")}, data={"model": "org/lora"}
    )
    assert response.status_code == 200
    assert "org/lora" in "\n".join(gateway.engine_log()).rpartition("/v1/audio/transcriptions")[2]


async def test_adapter_does_not_embed_and_the_message_names_the_model_that_does(gateway: Gateway) -> None:
    response = await gateway.client.post("/v1/embeddings", json={"model": "org/lora", "input": "x"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "not_supported")
    assert "use 'm' for this" in response.json()["error"]["message"]
    assert gateway.engine_bodies() == []


async def test_plain_response_of_llama_cpp_is_assembled_from_a_stream(gateway: Gateway) -> None:
    """llama.cpp stops at once only if a stream is closed."""
    response = await gateway.chat("hello")
    assert gateway.engine_bodies()[-1]["stream"] is True
    assert response.headers["content-type"] == "application/json"
    assert response.json()["choices"][0]["message"]["content"]
    assert response.json()["usage"]["total_tokens"] == 12


async def test_body_that_needs_no_change_is_forwarded_byte_for_byte(gateway: Gateway) -> None:
    gateway.use_vllm()
    body = b'{ "model":"m",  "messages" : [{"role":"user","content":"\\u00e9 hello"}], "x-new": [1.50, {"a" :null}]}'
    response = await gateway.client.post("/v1/chat/completions", content=body)
    assert response.status_code == 200
    assert gateway.engine_log()[-1].split(" ", 2)[2] == body.decode()


async def test_developer_messages_become_system_messages(gateway: Gateway) -> None:
    messages = [{"role": "developer", "content": "be brief", "name": "x"}, {"role": "user", "content": "hello"}]
    assert (await gateway.client.post("/v1/chat/completions", json={"messages": messages})).status_code == 200
    assert gateway.engine_bodies()[-1]["messages"] == [{**messages[0], "role": "system"}, messages[1]]


async def test_streaming_default_needs_a_client_that_accepts_streams(run_dir: RunDir, engine_socket: Path) -> None:
    config = make_config(run_dir, inference=InferenceConfig(streaming_default=True))
    async with run_gateway(run_dir, engine_socket, config) as gateway:
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


async def test_transcription_form_reaches_the_engine_with_the_models_name(gateway: Gateway) -> None:
    response = await gateway.client.post(
        "/v1/audio/transcriptions",
        data={"model": "gpt-4o", "language": "en"},
        files={"file": ("a.wav", b"RIFF\x00\xff")},
    )
    assert response.status_code == 200
    log = Path(f"{gateway.engine_socket}.log").read_text()
    assert "gpt-4o" not in log
    assert re.search(r'name="model"\s+m\s', log)
    missing = await gateway.client.post("/v1/audio/transcriptions", data={"model": "m"}, files={"x": b""})
    assert missing.json()["error"]["param"] == "file"


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
async def test_manager_gets_the_task_of_a_request(
    gateway: Gateway, path: str, body: dict[str, Any], task: str | None
) -> None:
    gateway.manager.refusal = lambda request: control.Refused(request, "not_supported", "m does other things")
    response = await gateway.client.post(path, json={"model": "m", **body})
    assert (response.status_code, "m does other things" in response.text) == (400, True)
    assert [(one.model, one.task) for one in gateway.manager.received_of(lease_messages.Acquire)] == [("m", task)]

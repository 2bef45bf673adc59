"""Requests that are refused before an engine sees them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from llm_api_server.config.models import InferenceConfig
from llm_api_server.ipc.run_dir import RunDir
from tests.gateway_worker import EVERY_FIELD, Gateway, make_config, run_gateway

pytestmark = pytest.mark.anyio

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


@pytest.mark.parametrize(("path", "body", "status", "param"), WRONG)
async def test_wrong_request_is_the_clients_fault_and_never_reaches_the_engine(
    shared_gateway: Gateway, path: str, body: Any, status: int, param: str | None
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = await shared_gateway.client.post(path, content=content)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), response.text
    assert set(error) == EVERY_FIELD
    assert shared_gateway.engine_log() == []


async def test_model_without_a_chat_template_completes_only(gateway: Gateway) -> None:
    gateway.leases.models["m"].chat_template = False
    messages = [{"role": "user", "content": "hi"}]
    for path, body in (
        ("/v1/chat/completions", {"messages": messages}),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/messages", {"messages": messages, "max_tokens": 5}),
    ):
        response = await gateway.client.post(path, json=body)
        assert response.status_code == 400, path
        assert "models.available.NAME.engine_args: {chat_template: FILE}" in response.json()["error"]["message"]
    assert gateway.engine_log() == []
    assert (await gateway.client.post("/v1/completions", json={"prompt": "hi"})).status_code == 200


async def test_context_limits_are_counted_with_the_engines_tokenizer(run_dir: RunDir, engine_socket: Path) -> None:
    config = make_config(run_dir, inference=InferenceConfig(max_input_tokens=600))
    async with run_gateway(run_dir, engine_socket, config) as gateway:
        fits = await gateway.chat("word " * 500)
        too_long = await gateway.chat("word " * 700)
        no_room = await gateway.chat("word " * 500, max_tokens=1600)
        prompt = await gateway.client.post("/v1/completions", json={"model": "m", "prompt": "word " * 601})
    assert fits.status_code == 200
    for response in (too_long, no_room, prompt):
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "context_length_exceeded"
    assert "703" in too_long.json()["error"]["message"]
    assert re.search(r"2000.*2103 tokens \(503 in the messages, 1600", no_room.json()["error"]["message"])
    assert "601" in prompt.json()["error"]["message"]


@pytest.mark.parametrize(("words", "status"), [(2000, 200), (2001, 400)])
async def test_embedding_input_may_fill_the_context(gateway: Gateway, words: int, status: int) -> None:
    response = await gateway.client.post("/v1/embeddings", json={"model": "m", "input": "x " * words})
    assert response.status_code == status

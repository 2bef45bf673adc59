"""Every request example of the documentation, with the real clients, a real server and a real model."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from openai import OpenAI

from tests.pictures import image_part, png
from tests.running import KEY, RESTRICTED_KEY, Server, running
from tests.waiting import wait_until

pytestmark = pytest.mark.story

MODEL = "SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, smollm2_gguf: Path) -> Iterator[Server]:
    config = {
        "models": {
            "default": MODEL,
            "preload": [MODEL],
            "available": {MODEL: {"path": str(smollm2_gguf), "type": "llama", "aliases": ["smol/alias"]}},
        },
        "inference": {"max_total_tokens": 2048, "max_batch_size": 4},
    }
    with running(tmp_path_factory.mktemp("server"), config) as server:
        wait_until(lambda: server.models()[MODEL]["state"] == "ready")
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(api_key=KEY, base_url=f"{server.url}/v1", max_retries=0) as client:
        yield client


def curl(server: Server, path: str, body: dict[str, Any] | None = None, *options: str) -> str:
    command = ["curl", "-sS", f"{server.url}{path}", "-H", f"Authorization: Bearer {KEY}", *options]
    if body is not None:
        command += ["-X", "POST", "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


MESSAGES: Any = [
    {"role": "system", "content": "你是一个有用的AI助手。"},
    {"role": "user", "content": "介绍一下自己"},
]


class TestCurl:
    def test_chat(self, server: Server) -> None:
        body = {"model": MODEL, "messages": MESSAGES, "temperature": 0.7, "max_tokens": 50}
        response = json.loads(curl(server, "/v1/chat/completions", body))
        assert response["object"] == "chat.completion"
        assert response["model"] == MODEL
        assert response["choices"][0]["message"]["role"] == "assistant"
        assert isinstance(response["choices"][0]["message"]["content"], str)
        usage = response["usage"]
        assert 0 < usage["completion_tokens"] <= 50
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]

    def test_streamed_chat(self, server: Server) -> None:
        body = {"model": MODEL, "messages": MESSAGES, "temperature": 0.7, "max_tokens": 20, "stream": True}
        text = curl(server, "/v1/chat/completions", body, "-N")
        events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        chunks = [json.loads(event) for event in events[:-1]]
        assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
        assert len({chunk["id"] for chunk in chunks}) == 1
        reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
        assert reasons[-1] in {"stop", "length"}
        assert set(reasons[:-1]) == {None}
        assert not any(chunk.get("usage") for chunk in chunks)

    def test_completion(self, server: Server) -> None:
        body = {"model": MODEL, "prompt": "讲一个关于人工智能的笑话", "temperature": 0.7, "max_tokens": 20}
        response = json.loads(curl(server, "/v1/completions", body))
        assert response["object"] == "text_completion"
        assert isinstance(response["choices"][0]["text"], str)

    def test_models(self, server: Server) -> None:
        (model,) = json.loads(curl(server, "/v1/models"))["data"]
        assert (model["id"], model["object"]) == (MODEL, "model")
        assert isinstance(model["created"], int)
        assert isinstance(model["owned_by"], str)
        assert model["status"] == "ready"
        assert model["context_length"] == 2048

    def test_embeddings_of_the_chat_model(self, server: Server) -> None:
        body = {"model": MODEL, "input": "人工智能将如何改变我们的未来？"}
        response = json.loads(curl(server, "/v1/embeddings", body))
        assert response["data"][0]["object"] == "embedding"
        assert len(response["data"][0]["embedding"]) == 576

    def test_picture_for_a_model_without_vision_is_refused(self, server: Server) -> None:
        content = [{"type": "text", "text": "这张图片里有什么？"}, image_part(png())]
        body = {"model": MODEL, "messages": [{"role": "user", "content": content}]}
        response = json.loads(curl(server, "/v1/chat/completions", body))
        assert response["error"]["type"] == "invalid_request_error"
        assert "param" in response["error"]


class TestPythonSdk:
    def test_chat(self, client: OpenAI) -> None:
        response = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0.7, max_tokens=30)
        assert isinstance(response.choices[0].message.content, str)
        assert response.choices[0].finish_reason in {"stop", "length"}

    def test_stream(self, client: OpenAI) -> None:
        stream = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, temperature=0.7, max_tokens=30, stream=True
        )
        contents = [chunk.choices[0].delta.content for chunk in stream]
        assert "".join(content for content in contents if content is not None)

    def test_stream_includes_usage_if_requested(self, client: OpenAI) -> None:
        stream = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=5, stream=True, stream_options={"include_usage": True}
        )
        *chunks, last = list(stream)
        assert last.choices == []
        assert last.usage is not None
        assert last.usage.completion_tokens <= 5
        assert all(chunk.usage is None for chunk in chunks)

    def test_completion_stream(self, client: OpenAI) -> None:
        stream = client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=10, stream=True)
        chunks = list(stream)
        assert "".join(chunk.choices[0].text for chunk in chunks)
        assert chunks[-1].choices[0].finish_reason in {"stop", "length"}

    def test_embeddings_keep_their_size_and_order(self, client: OpenAI) -> None:
        texts = ["a cat", "a dog", "the stock market fell"]
        together = client.embeddings.create(model=MODEL, input=texts)
        assert [item.index for item in together.data] == [0, 1, 2]
        assert {len(item.embedding) for item in together.data} == {576}
        alone = client.embeddings.create(model=MODEL, input=texts[2])
        assert cosine(together.data[2].embedding, alone.data[0].embedding) > 0.99

    def test_models(self, client: OpenAI) -> None:
        assert [model.id for model in client.models.list()] == [MODEL]
        assert client.models.retrieve(MODEL).id == MODEL

    def test_alias_with_a_slash(self, client: OpenAI) -> None:
        assert client.models.retrieve("smol/alias").id in {MODEL, "smol/alias"}
        client.chat.completions.create(model="smol/alias", messages=MESSAGES, max_tokens=2)

    def test_default_model(self, server: Server) -> None:
        with server.client() as http:
            response = http.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 2})
        assert response.json()["model"] == MODEL

    def test_responses(self, client: OpenAI) -> None:
        response = client.responses.create(model=MODEL, input="Say hello", max_output_tokens=16, store=False)
        assert response.output_text

    def test_json_schema(self, client: OpenAI) -> None:
        schema = {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer"}},
            "required": ["city", "people"],
            "additionalProperties": False,
        }
        response = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Name a big city and how many people live there."}],
            response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}},
            max_tokens=200,
        )
        content = json.loads(response.choices[0].message.content or "")
        assert set(content) == {"city", "people"}

    def test_wrong_key(self, server: Server) -> None:
        with pytest.raises(openai.AuthenticationError) as caught:
            OpenAI(api_key="sk-wrong", base_url=f"{server.url}/v1").models.list()
        assert caught.value.code == "invalid_api_key"

    def test_key_without_the_permission(self, server: Server) -> None:
        restricted = OpenAI(api_key=RESTRICTED_KEY, base_url=f"{server.url}/v1")
        restricted.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=2)
        with pytest.raises(openai.PermissionDeniedError):
            restricted.embeddings.create(model=MODEL, input="x")

    def test_unknown_model(self, client: OpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(model="no-such-model", messages=MESSAGES)
        assert caught.value.code == "model_not_found"

    def test_too_long_a_prompt(self, client: OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hello " * 5000}])
        assert caught.value.code == "context_length_exceeded"

    def test_anthropic_messages(self, server: Server) -> None:
        client = anthropic.Anthropic(api_key=KEY, base_url=server.url, max_retries=0)
        message = client.messages.create(
            model=MODEL, max_tokens=10, messages=[{"role": "user", "content": "Say hello"}]
        )
        assert message.usage.output_tokens <= 10
        with client.messages.stream(
            model=MODEL, max_tokens=10, messages=[{"role": "user", "content": "Say hello"}]
        ) as stream:
            assert "".join(stream.text_stream)
        with pytest.raises(anthropic.NotFoundError) as caught:
            client.messages.create(model="nope", max_tokens=1, messages=[{"role": "user", "content": "x"}])
        assert caught.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]


def test_node_sdk(server: Server, node_openai: Path) -> None:
    script = Path(__file__).with_name("openai_client.mjs").read_text(encoding="utf-8")
    result = subprocess.run(
        ["node", "--input-type=module", "-e", script, f"{server.url}/v1", KEY, MODEL],
        cwd=node_openai, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["models"] == [MODEL]
    assert facts["chat"]["role"] == "assistant"
    assert facts["streamed"]
    assert facts["finish"] in {"stop", "length"}
    assert facts["dimensions"] == 576
    assert facts["missing"] == {"status": 404, "code": "model_not_found"}
    assert facts["unauthorized"] == {"status": 401, "code": "invalid_api_key"}


def test_every_response_has_a_request_id(server: Server) -> None:
    with server.client() as client:
        responses = [
            client.get("/v1/models"),
            client.get("/nowhere"),
            client.post("/v1/chat/completions", content=b"{"),
            client.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 1, "stream": True}),
            httpx.get(f"{server.url}/v1/models"),
        ]
    ids = [response.headers["x-request-id"] for response in responses]
    assert len(set(ids)) == len(ids)
    assert [response.status_code for response in responses] == [200, 404, 400, 200, 401]


def test_no_secret_and_no_prompt_in_the_logs(server: Server, client: OpenAI) -> None:
    client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "planted-prompt-7421"}], max_tokens=2
    )
    logs = list((server.folder / "logs").rglob("*.log"))
    assert {"gateway.log", "manager.log"} <= {log.name for log in logs}
    texts = [log.read_text(errors="replace") for log in logs]
    assert any(MODEL in text for text in texts)
    for text in texts:
        assert KEY not in text
        assert "planted-prompt-7421" not in text


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

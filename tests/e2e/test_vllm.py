"""A real vLLM behind the same server as llama.cpp: chat, embeddings, streams, aborts and failures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from tests.running import KEY, Server, running
from tests.waiting import wait_until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

LLAMA = "smol-llama.cpp"
VLLM = "smol/vllm"
MINILM = "all-MiniLM-L6-v2"
MESSAGES: Any = [{"role": "user", "content": "Say hello in five words."}]


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory,
    smollm2_gguf: Path,
    smollm2_folder: Path,
    minilm_folder: Path,
    vllm_python: Path,
) -> Iterator[Server]:
    config = {
        "server": {"timeout": 400},
        "models": {
            "default": VLLM,
            "max_loaded": 3,
            "available": {
                LLAMA: {"path": str(smollm2_gguf), "max_tokens": 1024},
                VLLM: {"path": str(smollm2_folder), "type": "llama", "max_tokens": 1024},
                MINILM: {"path": str(minilm_folder), "type": "bert"},
                "broken": {"path": str(broken(tmp_path_factory.mktemp("broken"), smollm2_folder))},
            },
        },
        "inference": {"max_batch_size": 4},
        "engines": {"vllm": {"python": str(vllm_python)}},
    }
    with running(tmp_path_factory.mktemp("vllm"), config) as server:
        yield server


def broken(folder: Path, good: Path) -> Path:
    """A model of an architecture that does not exist."""
    config = json.loads((good / "config.json").read_text())
    config["architectures"] = ["NoSuchForCausalLM"]
    config["model_type"] = "nosuch"
    for item in good.iterdir():
        (folder / item.name).symlink_to(item)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(api_key=KEY, base_url=f"{server.url}/v1", max_retries=0, timeout=500) as client:
        yield client


@pytest.mark.parametrize("model", [VLLM, LLAMA])
def test_chat_on_both_engines(client: OpenAI, model: str) -> None:
    response = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=8, temperature=0)
    assert response.model == model
    assert response.choices[0].message.content
    assert response.usage is not None
    assert 0 < response.usage.completion_tokens <= 8


@pytest.mark.parametrize("model", [VLLM, LLAMA])
def test_streams_on_both_engines(client: OpenAI, model: str) -> None:
    stream = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=8, stream=True)
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices[0].finish_reason in {"stop", "length"}
    assert all(chunk.usage is None for chunk in chunks)


def test_minilm_embeds(client: OpenAI) -> None:
    response = client.embeddings.create(model=MINILM, input=["a cat", "a kitten", "the stock market fell"])
    cat, kitten, market = (item.embedding for item in response.data)
    assert len(cat) == 384
    assert cosine(cat, kitten) > cosine(cat, market)


def test_chat_on_an_embedding_model_is_the_clients_fault(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MINILM, messages=MESSAGES)
    assert caught.value.code is None or isinstance(caught.value.code, str)


def test_too_long_a_prompt(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=VLLM, messages=[{"role": "user", "content": "hello " * 3000}])
    assert caught.value.code == "context_length_exceeded"


def test_errors_have_a_string_code(server: Server) -> None:
    with server.client() as http:
        body = {"model": VLLM, "messages": MESSAGES, "temperature": -5}
        response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] is None or isinstance(error["code"], str)


def test_tokenize(server: Server) -> None:
    with server.client() as http:
        response = http.post("/tokenize", json={"model": VLLM, "prompt": "hello world"})
    assert response.json()["count"] == 2


def test_client_that_leaves_stops_generation(server: Server) -> None:
    body = {"model": VLLM, "prompt": "Once", "max_tokens": 900, "ignore_eos": True}
    with server.client(timeout=400) as http:
        http.post(f"/admin/api/models/{VLLM}/load").raise_for_status()
    with pytest.raises(httpx.ReadTimeout), server.client(timeout=2) as http:
        http.post("/v1/completions", json=body)
    wait_until(lambda: server.models()[VLLM]["in_flight"] == 0, timeout=10)
    wait_until(lambda: running_in_engine(server) == 0, timeout=10)


def running_in_engine(server: Server) -> int:
    instance = server.models()[VLLM]["instance"]
    transport = httpx.HTTPTransport(uds=str(server.run_dir / "engines" / f"{instance}.sock"))
    with httpx.Client(transport=transport, base_url="http://engine") as engine:
        lines = engine.get("/metrics").text.splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith("vllm:num_requests_running"))


def test_unknown_architecture_fails_with_the_reason_of_vllm(server: Server) -> None:
    with server.client(timeout=400) as http:
        response = http.post("/v1/completions", json={"model": "broken", "prompt": "x"})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "model_load_failed")
        assert "nosuch" in response.json()["error"]["message"].lower()
        assert http.post("/v1/completions", json={"model": LLAMA, "prompt": "x", "max_tokens": 1}).status_code == 200


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

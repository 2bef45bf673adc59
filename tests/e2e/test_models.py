"""Loads, swaps under load, unloads and failures of two real models."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.running import TLS, Server, running
from tests.waiting import wait_until

SMOL = "SmolLM2-135M-Instruct"
GEMMA = "gemma-3-270m"
PROMPT = "Tokenizers differ: 人工智能, Überraschung, 1234567890."


@pytest.fixture(scope="module")
def available(smollm2_gguf: Path, gemma3_gguf: Path) -> dict[str, Any]:
    return {
        SMOL: {"path": str(smollm2_gguf), "type": "llama", "max_tokens": 512},
        GEMMA: {"path": str(gemma3_gguf), "type": "gemma", "max_tokens": 512},
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, available: dict[str, Any]) -> Iterator[Server]:
    config = {"models": {"max_loaded": 1, "available": available}, "inference": {"max_batch_size": 4}}
    with running(tmp_path_factory.mktemp("swap"), config) as server:
        yield server


def load(server: Server) -> None:
    """Load SMOL, so that the first line of a stream is not a comment about the load."""
    with server.client() as client:
        client.post(f"/admin/api/models/{SMOL}/load").raise_for_status()


def complete(client: httpx.Client, model: str, tokens: int = 4) -> dict[str, Any]:
    body = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


@pytest.mark.timeout(900)
def test_200_random_requests_to_two_models_in_one_slot(server: Server) -> None:
    """The number of prompt tokens shows which model generated the response, since the tokenizers differ."""
    with server.client() as client:
        prompt_tokens = {model: complete(client, model)["usage"]["prompt_tokens"] for model in (SMOL, GEMMA)}
    assert prompt_tokens[SMOL] != prompt_tokens[GEMMA]
    choices = random.Random(7).choices((SMOL, GEMMA), k=200)
    most_engines = 0

    def ask(model: str) -> tuple[str, dict[str, Any]]:
        with server.client(timeout=300) as client:
            return model, complete(client, model, tokens=4)

    done = threading.Event()

    def watch() -> None:
        nonlocal most_engines
        while not done.wait(0.2):
            most_engines = max(most_engines, len(server.engines()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(ask, choices))
    done.set()
    watcher.join()

    assert Counter(model for model, _ in responses) == Counter(choices)
    for model, response in responses:
        assert response["model"] == model
        assert response["usage"]["prompt_tokens"] == prompt_tokens[model]
        assert response["usage"]["completion_tokens"] == 4
        assert response["choices"][0]["finish_reason"] == "length"
    assert most_engines == 1


def test_many_requests_cause_one_load(server: Server) -> None:
    with server.client() as client:
        client.post(f"/admin/api/models/{SMOL}/unload").raise_for_status()
        client.post(f"/admin/api/models/{GEMMA}/unload").raise_for_status()
        assert server.engines() == []
        with ThreadPoolExecutor(8) as pool:
            responses = list(pool.map(lambda _: complete(client, SMOL), range(8)))
    assert len({response["id"] for response in responses}) == 8
    assert len(server.engines()) == 1


def test_load_outlives_the_client_that_caused_it(server: Server) -> None:
    with server.client() as client:
        client.post(f"/admin/api/models/{SMOL}/unload").raise_for_status()
        client.post(f"/admin/api/models/{GEMMA}/unload").raise_for_status()
    with pytest.raises(httpx.ReadTimeout), server.client(timeout=0.2) as impatient:
        complete(impatient, SMOL)
    wait_until(lambda: server.models()[SMOL]["state"] == "ready")


@pytest.mark.story
def test_swap_never_cuts_a_stream(server: Server) -> None:
    body = {"model": SMOL, "prompt": PROMPT, "max_tokens": 300, "stream": True, "ignore_eos": True}
    load(server)
    with (
        server.client() as client,
        client.stream("POST", "/v1/completions", json=body | {"stream_options": {"include_usage": True}}) as stream,
    ):
        lines = stream.iter_lines()
        assert next(lines).startswith("data: ")
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(complete, client, GEMMA)
            chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            assert other.result()["model"] == GEMMA
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["usage"]["completion_tokens"] == 300


def test_load_and_unload_by_the_admin_api(server: Server) -> None:
    with server.client() as client:
        client.post(f"/admin/api/models/{GEMMA}/load").raise_for_status()
        status = server.models()[GEMMA]
        assert status["state"] == "ready"
        assert status["pid"] > 0
        assert status["memory_bytes"] > 50_000_000
        assert status["in_flight"] == 0
        client.post(f"/admin/api/models/{GEMMA}/unload").raise_for_status()
        assert server.models()[GEMMA]["state"] == "stopped"
        missing = client.post("/admin/api/models/nothing/load")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    assert server.engines() == []


@pytest.mark.story
def test_killed_engine_ends_its_streams_with_an_error_and_is_replaced(server: Server) -> None:
    body = {"model": SMOL, "prompt": PROMPT, "max_tokens": 400, "stream": True, "ignore_eos": True}
    load(server)
    with server.client() as client, client.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        (engine,) = server.engines()
        engine.kill()
        rest = [line for line in lines if line]
    assert "data: [DONE]" not in rest
    error = json.loads(rest[-1].removeprefix("data: "))["error"]
    assert set(error) == {"message", "type", "param", "code"}
    with server.client() as client:
        assert complete(client, SMOL)["model"] == SMOL


def test_client_that_leaves_a_stream_stops_the_engine(server: Server) -> None:
    body = {"model": SMOL, "prompt": PROMPT, "max_tokens": 480, "stream": True, "ignore_eos": True}
    load(server)
    with server.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        wait_until(lambda: processing(server) == 1)
    wait_until(lambda: in_flight(server) == 0, timeout=10)
    wait_until(lambda: processing(server) == 0, timeout=10)


def test_client_that_leaves_before_the_response_stops_the_engine(server: Server) -> None:
    load(server)
    body = {"model": SMOL, "prompt": PROMPT, "max_tokens": 480, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout), server.client(timeout=1) as client:
        client.post("/v1/completions", json=body)
    wait_until(lambda: in_flight(server) == 0, timeout=10)
    wait_until(lambda: processing(server) == 0, timeout=10)


def in_flight(server: Server) -> int:
    return int(server.models()[SMOL]["in_flight"])


def processing(server: Server) -> int:
    """Return the number of requests in progress by llama.cpp's own metrics.

    Frequent calls keep llama.cpp from noticing by itself that a plain request's client has left.
    """
    socket = server.run_dir / "engines" / f"{server.models()[SMOL]['instance']}.sock"
    transport = httpx.HTTPTransport(uds=str(socket), verify=TLS)
    with httpx.Client(transport=transport, base_url="http://engine") as engine:
        text = engine.get("/metrics").text
    (value,) = [line.split()[-1] for line in text.splitlines() if line.startswith("llamacpp:requests_processing ")]
    return int(float(value))


def test_broken_models_fail_with_a_reason_and_the_server_stays_up(tmp_path: Path, smollm2_gguf: Path) -> None:
    whole = smollm2_gguf.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.gguf").write_text("this is no model")
    (tmp_path / "strange.gguf").write_bytes(whole.replace(b"llama", b"lamma", 1))
    config = {
        "models": {
            "preload": ["cut"],
            "available": {
                "cut": {"path": str(tmp_path / "cut.gguf")},
                "text": {"path": str(tmp_path / "text.gguf")},
                "strange": {"path": str(tmp_path / "strange.gguf")},
                "missing": {"path": "/path/to/model"},
                "good": {"path": str(smollm2_gguf), "max_tokens": 256},
            },
        }
    }
    with running(tmp_path, config) as server, server.client() as client:
        for model in ("cut", "text", "strange", "missing"):
            response = client.post("/v1/completions", json={"model": model, "prompt": "x", "max_tokens": 1})
            error = response.json()["error"]
            assert (response.status_code, error["code"]) == (503, "model_load_failed"), response.text
            assert str(tmp_path) not in response.text
            status = server.models()[model]
            assert status["state"] == "failed"
            assert status["error"] in error["message"]
        listed = {model["id"]: model for model in client.get("/v1/models").json()["data"]}
        assert listed["cut"]["status"] == "failed"
        assert complete(client, "good", 1)["model"] == "good"


def test_base_model_chats_only_with_a_configured_template(tmp_path: Path, gemma3_gguf: Path) -> None:
    (tmp_path / "plain.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    entry = {"path": str(gemma3_gguf), "max_tokens": 512}
    available = {"bare": entry, "taught": entry | {"engine_args": {"chat_template": "plain.jinja"}}}
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
    with running(tmp_path, {"models": {"available": available}}) as server, server.client() as client:
        wait_until(lambda: server.models()["bare"]["context_length"])
        refused = client.post("/v1/chat/completions", json={"model": "bare", **body})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "not_supported")
        assert server.engines() == []
        answered = client.post("/v1/chat/completions", json={"model": "taught", **body})
        assert answered.status_code == 200
        assert answered.json()["usage"]["prompt_tokens"] < 10  # the roles' words and no ChatML tokens

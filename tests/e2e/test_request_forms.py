"""Forms of requests that llama.cpp misreads, refuses or obeys too well, on the real engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.test_structured import TEMPLATE, TOOLS
from tests.running import KEY, TLS, Server, running
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(300)

MODEL = "SmolLM2"
EMBEDDER = "SmolLM2 that embeds"
USER = {"role": "user", "content": "Count from one to twenty."}
CHAT = "/v1/chat/completions"
#: Requests for at least one token, each with the name of its stop texts.
GENERATING: list[tuple[str, str, dict[str, Any]]] = [
    (CHAT, "stop", {"messages": [USER], "max_tokens": 6}),
    ("/v1/completions", "stop", {"prompt": "One, two,", "max_tokens": 6}),
    ("/v1/responses", "stop", {"input": "Count to ten.", "max_output_tokens": 6}),
    ("/v1/messages", "stop_sequences", {"messages": [USER], "max_tokens": 6}),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, smollm2_gguf: Any) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("s")
    template = folder / "tools.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    model = {"path": str(smollm2_gguf), "max_tokens": 1024, "engine_args": {"chat_template": str(template)}}
    available = {MODEL: model, EMBEDDER: {"path": str(smollm2_gguf), "task": "embed"}}
    models = {"default": MODEL, "preload": [MODEL], "max_loaded": 2, "available": available}
    with running(folder, {"models": models}) as server:
        wait_until(lambda: server.models()[MODEL]["state"] == "ready", timeout=120)
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=100, verify=TLS) as client:
        yield client


def answer(client: httpx.Client, path: str, body: dict[str, Any]) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def output_tokens(answer: Any) -> int:
    usage = answer["usage"]
    return int(usage.get("completion_tokens", usage.get("output_tokens")))


@pytest.mark.parametrize(("path", "name", "body"), GENERATING)
def test_empty_stop_texts_do_not_end_the_response(
    client: httpx.Client, path: str, name: str, body: dict[str, Any]
) -> None:
    given: list[Any] = [[""], ["", "zzz"]] if name == "stop_sequences" else ["", [""], ["", "zzz"]]
    for stops in given:
        assert output_tokens(answer(client, path, {**body, name: stops})) > 1, stops
    streamed = client.post(path, json={**body, name: ["", "zzz"], "stream": True})
    assert streamed.text.count("data: ") > 4


def test_other_stop_texts_hold(client: httpx.Client) -> None:
    whole = answer(client, CHAT, {"messages": [USER], "max_tokens": 20, "temperature": 0})
    text = whole["choices"][0]["message"]["content"]
    stop = text[4:7]
    cut = answer(client, CHAT, {"messages": [USER], "max_tokens": 20, "temperature": 0, "stop": ["", stop]})
    assert cut["choices"][0]["message"]["content"] == text[: text.index(stop)]


@pytest.mark.parametrize(("path", "name", "body"), GENERATING)
def test_nulls_are_absent(client: httpx.Client, path: str, name: str, body: dict[str, Any]) -> None:
    nulls = {"tools": None, "tool_choice": None, name: None, "temperature": None, "top_p": None, "stream": None,
             "metadata": None, "user": None, "seed": None, "n_predict": None, "reasoning_format": None}  # fmt: skip
    assert output_tokens(answer(client, path, {**nulls, **body})) > 0


def test_nulls_of_an_embedding_are_absent(client: httpx.Client) -> None:
    nulls = {"encoding_format": None, "dimensions": None, "user": None}
    found = answer(client, "/v1/embeddings", {"model": EMBEDDER, "input": "x", **nulls})
    assert len(found["data"][0]["embedding"]) > 100


def test_whole_numbers_count_as_integers(client: httpx.Client) -> None:
    chat = answer(client, CHAT, {"messages": [USER], "max_tokens": 3.0, "seed": 1.0})
    assert output_tokens(chat) == 3


@pytest.mark.parametrize("arguments", ["", None, "null", "{}"])
@pytest.mark.parametrize("stream", [False, True])
def test_history_with_a_call_without_arguments_is_answered(
    client: httpx.Client, arguments: Any, *, stream: bool
) -> None:
    body = history(arguments) | {"stream": stream}
    response = client.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    assert '"error"' not in response.text


@pytest.mark.parametrize("arguments", ['{"city": "', "[1]", "{'city': 1}"])
def test_history_with_unreadable_arguments_is_the_clients_fault(client: httpx.Client, arguments: str) -> None:
    for more in ({}, {"stream": True}, {"tools": TOOLS, "tool_choice": "required"}):
        response = client.post(CHAT, json=history(arguments) | more)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == "messages[1].tool_calls[0].function.arguments"


def history(arguments: Any) -> dict[str, Any]:
    call = {"id": "1", "type": "function", "function": {"name": "ring_bell", "arguments": arguments}}
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "1", "content": "done"}
    return {"messages": [USER, said, result], "tools": TOOLS, "max_tokens": 4}


def test_refusal_in_the_history_is_read(client: httpx.Client) -> None:
    said = {"role": "assistant", "content": [{"type": "refusal", "refusal": "I will not count."}]}
    answer(client, CHAT, {"messages": [USER, said, USER], "max_tokens": 2})


def test_completion_without_a_limit_makes_16_tokens(client: httpx.Client) -> None:
    body = {"prompt": "1, 2, 3, 4,", "temperature": 0, "ignore_eos": True}
    found = answer(client, "/v1/completions", body)
    assert (output_tokens(found), found["choices"][0]["finish_reason"]) == (16, "length")
    streamed = client.post("/v1/completions", json={**body, "stream": True, "stream_options": {"include_usage": True}})
    usage = json.loads(streamed.text.split("data: ")[-2])["usage"]
    assert usage["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("path", "more"),
    [
        (CHAT, {"n_predict": 12}),
        (CHAT, {"n_predict": -1}),
        (CHAT, {"n_probs": 1_000_000}),
        (CHAT, {"n_cmpl": 4}),
        (CHAT, {"id_slot": 5000}),
        (CHAT, {"reasoning_format": "zzz"}),
        ("/v1/completions", {"max_completion_tokens": 12}),
        ("/v1/completions", {"max_tokens": 0}),
        ("/v1/responses", {"max_tokens": 12}),
        ("/v1/messages", {"n_predict": 12}),
    ],
)
def test_llama_cpps_own_names_do_not_bypass_the_limits(client: httpx.Client, path: str, more: dict[str, Any]) -> None:
    body = next(body for one, _, body in GENERATING if one == path)
    response = client.post(path, json={**body, **more})
    assert response.status_code == 400, response.text
    assert next(iter(more)) in response.json()["error"]["message"]


def test_harmless_extras_of_llama_cpp_pass(client: httpx.Client) -> None:
    extras = {"min_p": 0.1, "top_k": 20, "repeat_penalty": 1.1, "cache_prompt": True, "reasoning_format": "auto"}
    assert output_tokens(answer(client, CHAT, {"messages": [USER], "max_tokens": 2, **extras})) == 2

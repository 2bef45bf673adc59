"""All tasks of vLLM except generation, on real engines: embeddings of a chat model, ranking, scoring, tokens."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from openai import OpenAI

from tests.running import KEY, Server, running
from tests.waiting import wait_until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

CHAT, MINILM, RANKER, LLAMA = "org/smol", "minilm", "ranker", "smol-llama.cpp"
EMBEDDING = f"{CHAT} (embeddings)"
TEXTS = ["a cat sat on the mat", "hello", "The stock market fell by five percent on Monday, said the bank. " * 3]
MESSAGES: Any = [{"role": "user", "content": "Say hello in five words."}]
CONTEXT = 1024


#: One model of each kind that no test loads.
COLD = {CHAT: "cold-chat", MINILM: "cold-minilm", RANKER: "cold-ranker", LLAMA: "cold-llama"}


@pytest.fixture(scope="module")
def available(smollm2_folder: Path, minilm_folder: Path, ranker_folder: Path, smollm2_gguf: Path) -> dict[str, Any]:
    used: dict[str, dict[str, Any]] = {
        CHAT: {"path": str(smollm2_folder), "type": "llama", "max_tokens": CONTEXT, "aliases": ["gpt-4o"]},
        MINILM: {"path": str(minilm_folder)},
        RANKER: {"path": str(ranker_folder)},
        LLAMA: {"path": str(smollm2_gguf), "max_tokens": CONTEXT},
    }
    return used | {COLD[name]: {"path": entry["path"]} for name, entry in used.items()}


def config_for(available: dict[str, Any], python: Path, max_loaded: int) -> dict[str, Any]:
    return {
        "server": {"timeout": 500},
        "models": {"max_loaded": max_loaded, "min_loaded_time": 0, "available": available},
        "engines": {"vllm": {"python": str(python), "zygote": True}},
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, available: dict[str, Any], vllm_python: Path) -> Iterator[Server]:
    """A server with slots for all models that are used."""
    with running(tmp_path_factory.mktemp("all"), config_for(available, vllm_python, 5)) as server:
        yield server


@pytest.fixture(scope="module")
def small_server(
    tmp_path_factory: pytest.TempPathFactory, available: dict[str, Any], vllm_python: Path
) -> Iterator[Server]:
    """A server with one slot."""
    with running(tmp_path_factory.mktemp("one"), config_for(available, vllm_python, 1)) as server:
        yield server


def client_of(server: Server) -> OpenAI:
    return OpenAI(api_key=KEY, base_url=f"{server.url}/v1", max_retries=0, timeout=550)


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with client_of(server) as client:
        yield client


def post(server: Server, path: str, **body: Any) -> Any:
    with server.client(timeout=550) as client:
        return client.post(path, json=body)


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def test_chat_continues_while_the_embedding_instance_loads_and_embeds(client: OpenAI, server: Server) -> None:
    stream = client.completions.create(
        model=CHAT, prompt="Once", max_tokens=1000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    chatting = server.models()[CHAT]
    response = client.embeddings.create(model=CHAT, input="hello")
    assert response.model == CHAT
    assert len(response.data[0].embedding) == 576
    assert response.usage.prompt_tokens == response.usage.total_tokens == 1
    models = server.models()
    assert (models[CHAT]["state"], models[EMBEDDING]["state"]) == ("ready", "ready")
    assert models[CHAT]["in_flight"] == 1
    assert models[CHAT]["instance"] == chatting["instance"]
    assert models[EMBEDDING]["twin_of"] == CHAT
    assert models[CHAT]["pid"] != models[EMBEDDING]["pid"]
    assert all(psutil.pid_exists(models[name]["pid"]) for name in (CHAT, EMBEDDING))
    assert next(iter(stream)).choices[0].finish_reason is None
    stream.close()


def test_several_inputs_have_the_embeddings_of_each_alone(client: OpenAI) -> None:
    together = client.embeddings.create(model="gpt-4o", input=TEXTS)
    assert [item.index for item in together.data] == [0, 1, 2]
    assert together.model == CHAT
    for text, item in zip(TEXTS, together.data, strict=True):
        alone = client.embeddings.create(model=CHAT, input=text).data[0].embedding
        assert cosine(item.embedding, alone) > 0.999
    assert cosine(together.data[0].embedding, together.data[2].embedding) < 0.999


def test_tokens_have_the_embedding_of_their_text(client: OpenAI, server: Server) -> None:
    tokens = post(server, "/tokenize", model=CHAT, prompt=TEXTS[0]).json()["tokens"]
    texts = client.embeddings.create(model=CHAT, input=TEXTS[0])
    assert texts.usage.prompt_tokens == len(tokens)
    assert cosine(client.embeddings.create(model=CHAT, input=tokens).data[0].embedding, texts.data[0].embedding) > 0.999


def test_base64_holds_the_floats(server: Server) -> None:
    floats = post(server, "/v1/embeddings", model=CHAT, input="hello", encoding_format="float").json()
    packed = post(server, "/v1/embeddings", model=CHAT, input="hello", encoding_format="base64").json()
    raw = base64.b64decode(packed["data"][0]["embedding"])
    assert struct.unpack("<576f", raw) == pytest.approx(floats["data"][0]["embedding"], abs=1e-4)
    assert packed["usage"] == floats["usage"]


def test_conversation_is_embedded(server: Server) -> None:
    response = post(server, "/v1/embeddings", model=CHAT, messages=MESSAGES)
    assert len(response.json()["data"][0]["embedding"]) == 576


def test_unsupported_dimensions_are_refused(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        client.embeddings.create(model=CHAT, input="hello", dimensions=32)


@pytest.mark.parametrize("texts", ["hello " * 3000, ["short", "hello " * 3000]])
def test_too_long_an_input(client: OpenAI, texts: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model=CHAT, input=texts)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("model", [CHAT, LLAMA])
def test_embedding_input_may_fill_the_context(client: OpenAI, model: str) -> None:
    response = client.embeddings.create(model=model, input=" hello" * CONTEXT)
    assert response.usage.prompt_tokens == CONTEXT
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(model=model, input=" hello" * (CONTEXT + 1))


def test_long_input_that_fits_is_embedded_whole(client: OpenAI) -> None:
    begins = ["cats purr and sleep all day. " * 60, "stocks fall and banks close. " * 60]
    first, second = (client.embeddings.create(model=CHAT, input=text + "The end") for text in begins)
    assert first.usage.prompt_tokens > 256
    assert cosine(first.data[0].embedding, second.data[0].embedding) < 0.999


def test_chat_model_scores_and_ranks_by_its_embeddings(server: Server, client: OpenAI) -> None:
    query, documents = TEXTS[0], [TEXTS[2], TEXTS[0]]
    embedded = [item.embedding for item in client.embeddings.create(model=CHAT, input=[query, *documents]).data]
    scored = post(server, "/score", model=CHAT, text_1=query, text_2=documents).json()
    scores = [item["score"] for item in scored["data"]]
    assert scores == pytest.approx([cosine(embedded[0], other) for other in embedded[1:]], abs=0.01)
    ranked = post(server, "/v1/rerank", model=CHAT, query=query, documents=documents).json()
    assert [item["index"] for item in ranked["results"]] == [1, 0]


def test_tokens_of_both_engines_have_one_form(server: Server) -> None:
    for body in ({"prompt": "hello world"}, {"messages": MESSAGES}):
        responses = [post(server, "/v1/tokenize", model=model, **body).json() for model in (CHAT, LLAMA)]
        assert responses[0] == responses[1]
        assert responses[0]["count"] == len(responses[0]["tokens"])
        assert responses[0]["max_model_len"] == CONTEXT
        texts = [
            post(server, "/detokenize", model=model, tokens=responses[0]["tokens"]).json() for model in (CHAT, LLAMA)
        ]
        assert texts[0] == texts[1]
        assert list(texts[0]) == ["prompt"]


def test_conversation_has_the_tokens_of_its_prompt(server: Server) -> None:
    for model in (CHAT, LLAMA):
        count = post(server, "/tokenize", model=model, messages=MESSAGES).json()["count"]
        response = post(server, "/v1/chat/completions", model=model, messages=MESSAGES, max_tokens=1).json()
        assert response["usage"]["prompt_tokens"] == count


def test_unload_unloads_both_instances_and_load_loads_the_chat_model(server: Server) -> None:
    assert post(server, "/v1/embeddings", model=CHAT, input="x").status_code == 200
    assert post(server, f"/admin/api/models/{CHAT}/load").json()["state"] == "ready"
    before = server.models()
    pids = [before[name]["pid"] for name in (CHAT, EMBEDDING)]
    assert post(server, f"/admin/api/models/{CHAT}/unload").json()["state"] == "stopped"
    models = server.models()
    assert EMBEDDING not in models
    assert post(server, f"/admin/api/models/{CHAT}/load").json()["state"] == "ready"
    assert EMBEDDING not in server.models()
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_embedding_instance_outlives_a_killed_manager(server: Server, client: OpenAI) -> None:
    client.embeddings.create(model=CHAT, input="x")
    before = server.models()[EMBEDDING]
    server.manager().kill()
    assert post(server, "/v1/embeddings", model=CHAT, input="x").status_code == 200
    wait_until(server.has_manager)
    assert (server.models()[EMBEDDING]["instance"], server.models()[EMBEDDING]["pid"]) == (
        before["instance"],
        before["pid"],
    )


def test_instances_of_a_model_swap_in_one_slot_without_loss(small_server: Server) -> None:
    """Requests of both kinds at once, beside a stream that began before them."""
    with client_of(small_server) as client, ThreadPoolExecutor() as pool:
        stream = client.completions.create(
            model=CHAT, prompt="Once", max_tokens=50, stream=True, extra_body={"ignore_eos": True}
        )
        chunks = iter(stream)
        next(chunks)

        def embed() -> int:
            return len(client.embeddings.create(model=CHAT, input="hello").data[0].embedding)

        def chat() -> str | None:
            response = client.chat.completions.create(model=CHAT, messages=MESSAGES, max_tokens=2)
            return response.choices[0].finish_reason

        asked: list[Future[Any]] = [pool.submit(one) for one in (embed, chat, embed, embed)]
        assert sum(1 for _ in chunks) >= 49
        assert [one.result() for one in asked] == [576, "length", 576, 576]
    loaded = [model for model in small_server.models().values() if model["state"] != "stopped"]
    assert len(loaded) <= 1


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_ranking_model_ranks(server: Server, path: str) -> None:
    documents = ["a kitten", "the stock market fell", "it rains"]
    body = {"model": RANKER, "query": "a cat", "documents": documents}
    response = post(server, path, **body).raise_for_status().json()
    scores = [item["relevance_score"] for item in response["results"]]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == 3
    assert sorted(item["index"] for item in response["results"]) == [0, 1, 2]
    assert all(item["document"]["text"] == documents[item["index"]] for item in response["results"])
    assert response["model"] == RANKER
    assert response["usage"]["total_tokens"] > 0
    best = post(server, path, **body, top_n=1).json()["results"]
    assert [item["index"] for item in best] == [response["results"][0]["index"]]


def test_ranking_model_scores_pairs_as_it_ranks(server: Server) -> None:
    documents = ["a kitten", "the stock market fell"]
    ranked = post(server, "/rerank", model=RANKER, query="a cat", documents=documents).json()["results"]
    by_index = {item["index"]: item["relevance_score"] for item in ranked}
    for path in ("/score", "/v1/score"):
        scored = post(server, path, model=RANKER, text_1="a cat", text_2=documents).raise_for_status().json()["data"]
        assert {item["index"]: item["score"] for item in scored} == pytest.approx(by_index, abs=1e-4)


def test_ranking_model_classifies_and_pools(server: Server) -> None:
    classified = post(server, "/classify", model=RANKER, input="a cat").raise_for_status().json()["data"][0]
    pooled = post(server, "/pooling", model=RANKER, input="a cat").raise_for_status().json()["data"][0]
    assert classified["num_classes"] == 1
    assert pooled["data"] == pytest.approx(classified["probs"], abs=1e-4)


def test_embedding_model_scores_by_meaning(server: Server, client: OpenAI) -> None:
    documents = ["the stock market fell", "a kitten"]
    ranked = post(server, "/rerank", model=MINILM, query="a cat", documents=documents).json()["results"]
    assert [item["index"] for item in ranked] == [1, 0]
    scored = post(server, "/v1/score", model=MINILM, text_1="a cat", text_2=documents).json()["data"]
    vectors = [item.embedding for item in client.embeddings.create(model=MINILM, input=["a cat", *documents]).data]
    expected = [cosine(vectors[0], vector) for vector in vectors[1:]]
    assert [item["score"] for item in scored] == pytest.approx(expected, abs=1e-3)
    pooled = post(server, "/pooling", model=MINILM, input="a cat").json()["data"][0]["data"]
    assert pooled == pytest.approx(vectors[0], abs=1e-4)


@pytest.mark.parametrize("model", [MINILM, RANKER])
def test_models_that_do_not_generate_tokenize(server: Server, model: str) -> None:
    response = post(server, "/tokenize", model=model, prompt="hello world").json()
    assert (response["count"], response["tokens"]) == (4, [101, 7592, 2088, 102])
    assert post(server, "/detokenize", model=model, tokens=[7592, 2088]).json() == {"prompt": "hello world"}


WRONG: list[tuple[str, str, dict[str, Any], str]] = [
    (MINILM, "/v1/chat/completions", {"messages": MESSAGES}, "is an embedding model"),
    (MINILM, "/v1/chat/completions", {"messages": MESSAGES, "stream": True}, "use /v1/embeddings"),
    (MINILM, "/v1/completions", {"prompt": "x"}, "is an embedding model"),
    (MINILM, "/classify", {"input": "x"}, "does not classify"),
    (RANKER, "/v1/chat/completions", {"messages": MESSAGES}, "is a ranking model"),
    (RANKER, "/v1/embeddings", {"input": "x"}, "use /v1/rerank"),
    (RANKER, "/v1/messages", {"messages": MESSAGES, "max_tokens": 1}, "is a ranking model"),
    (CHAT, "/classify", {"input": "x"}, "is a generating model"),
    (LLAMA, "/rerank", {"query": "x", "documents": ["y"]}, "does not rank"),
    (LLAMA, "/score", {"text_1": "x", "text_2": "y"}, "does not score"),
]


@pytest.mark.parametrize(("model", "path", "body", "advice"), WRONG)
def test_unsupported_task_is_refused_before_the_model_loads(
    server: Server, model: str, path: str, body: dict[str, Any], advice: str
) -> None:
    name = COLD[model]
    response = post(server, path, model=name, **body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert advice.lower() in error["message"].lower()
    assert error.get("code", "not_supported") == "not_supported"
    models = server.models()
    assert models[name]["state"] == "stopped"
    assert f"{name} (embeddings)" not in models

"""LoRA adapters and a configured chat template on a real vLLM: names, permissions, responses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.lora import write_adapter
from tests.running import KEY, KEYS, Server, running

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

BASE, PLAIN, BARE = "smol", "smol-plain", "smol-bare"
LOUD, SOFT = "smol/loud", "smol-soft"
ADAPTER_KEY, BASE_KEY = "sk-adapter-0123456789", "sk-base-0123456789abc"
PROMPT = "The capital of France is"
MESSAGES: Any = [{"role": "user", "content": "Say hello in five words."}]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, smollm2_folder: Path, vllm_python: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("adapters")
    write_adapter(folder / "models" / "lora" / "loud", seed=1)
    write_adapter(folder / "models" / "lora" / "soft", seed=2)
    (folder / "models" / "mine.jinja").write_text(TEMPLATE)
    without_template(folder / "models" / "bare", smollm2_folder)
    entry = {"path": str(smollm2_folder), "type": "llama", "max_tokens": 512}
    bare = {"path": "bare", "max_tokens": 512}
    config = {
        "server": {"timeout": 400},
        "auth": {
            "api_keys": [
                *KEYS,
                {"key": ADAPTER_KEY, "name": "adapter", "models": [LOUD]},
                {"key": BASE_KEY, "name": "base", "models": [BASE]},
            ]
        },
        "models": {
            "max_loaded": 1,
            "available": {
                BASE: entry | {"adapters": {LOUD: "lora/loud", SOFT: "lora/soft"}, "aliases": ["gpt-4o"]},
                PLAIN: entry,
                BARE: bare,
                "smol-taught": bare | {"engine_args": {"chat-template": "mine.jinja"}},
            },
        },
        "inference": {"max_batch_size": 2},
        "engines": {"vllm": {"python": str(vllm_python), "zygote": True}},
    }
    with running(folder, config) as server:
        yield server


def without_template(folder: Path, good: Path) -> None:
    folder.mkdir()
    for item in good.iterdir():
        if item.name != "chat_template.jinja":
            (folder / item.name).symlink_to(item)


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(api_key=KEY, base_url=f"{server.url}/v1", max_retries=0, timeout=500) as client:
        yield client


def text_of(client: OpenAI, model: str) -> str:
    response = client.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0)
    assert response.model == model
    return response.choices[0].text


def test_each_adapter_changes_the_response_and_the_base_model_stays_the_same(server: Server, client: OpenAI) -> None:
    texts = {name: text_of(client, name) for name in (BASE, LOUD, SOFT)}
    assert len(set(texts.values())) == 3
    assert text_of(client, BASE) == texts[BASE]
    assert [one["id"] for one in server.models().values() if one["state"] == "ready"] == [BASE]
    assert text_of(client, PLAIN) == texts[BASE]


def test_adapters_are_models_to_the_sdk(client: OpenAI) -> None:
    parents = {model.id: (model.model_extra or {})["parent"] for model in client.models.list()}
    assert parents == {BASE: None, LOUD: BASE, SOFT: BASE, PLAIN: None, BARE: None, "smol-taught": None}
    one = client.models.retrieve(LOUD)
    assert (one.id, (one.model_extra or {})["parent"]) == (LOUD, BASE)


def test_every_form_of_response_has_the_adapters_name(server: Server, client: OpenAI) -> None:
    response = client.chat.completions.create(model=LOUD, messages=MESSAGES, max_tokens=4, temperature=0)
    assert (response.model, response.usage is not None) == (LOUD, True)
    stream = client.chat.completions.create(model=LOUD, messages=MESSAGES, max_tokens=4, stream=True)
    assert {chunk.model for chunk in stream} == {LOUD}
    assert client.responses.create(model=LOUD, input="Hello", max_output_tokens=4).model == LOUD
    with server.client() as http:
        body = {"model": LOUD, "messages": MESSAGES, "max_tokens": 4}
        assert http.post("/v1/messages", json=body).raise_for_status().json()["model"] == LOUD
        tokens = http.post("/tokenize", json={"model": LOUD, "prompt": "hello world"})
        assert tokens.json()["count"] == 2
    forced = client.chat.completions.create(
        model=LOUD,
        messages=MESSAGES,
        max_tokens=60,
        tools=[{"type": "function", "function": {"name": "greet", "parameters": {"type": "object", "properties": {}}}}],
        tool_choice="required",
    )
    assert forced.model == LOUD


def test_key_is_limited_to_an_adapter_or_to_its_base_model_by_name(server: Server) -> None:
    for key, allowed, refused in ((ADAPTER_KEY, LOUD, (BASE, SOFT, "gpt-4o")), (BASE_KEY, BASE, (LOUD, SOFT))):
        with OpenAI(api_key=key, base_url=f"{server.url}/v1", max_retries=0, timeout=500) as client:
            assert [model.id for model in client.models.list()] == [allowed]
            assert client.models.retrieve(allowed).id == allowed
            assert text_of(client, allowed)
            for name in refused:
                with pytest.raises(openai.PermissionDeniedError):
                    text_of(client, name)
                with pytest.raises(openai.NotFoundError):
                    client.models.retrieve(name)


def test_prompt_of_an_adapter_has_the_limit_of_its_model(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=LOUD, messages=[{"role": "user", "content": "hello " * 3000}])
    assert caught.value.code == "context_length_exceeded"


def test_model_without_a_chat_template_chats_only_with_a_configured_one(server: Server, client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=BARE, messages=MESSAGES, max_tokens=4)
    assert caught.value.code == "not_supported"
    assert "engine_args: {chat_template: FILE}" in caught.value.message
    assert text_of(client, BARE)
    response = client.chat.completions.create(model="smol-taught", messages=MESSAGES, max_tokens=4)
    assert response.usage is not None
    with server.client() as http:
        prompt = "user: Say hello in five words.\n"
        tokens = http.post("/tokenize", json={"model": "smol-taught", "prompt": prompt}).json()["count"]
    assert response.usage.prompt_tokens == tokens

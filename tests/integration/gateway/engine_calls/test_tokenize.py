"""Tokenize and detokenize: one form for clients, two for engines."""

from __future__ import annotations

import pytest

from tests.gateway_worker import Gateway

pytestmark = pytest.mark.anyio


async def test_tokens_of_llama_cpp_have_the_form_of_vllm(gateway: Gateway) -> None:
    for path in ("/tokenize", "/v1/tokenize"):
        for name in ("prompt", "content"):
            response = await gateway.client.post(path, json={"model": "gpt-4o", name: "one two"})
            assert response.json() == {"count": 2, "max_model_len": 2000, "tokens": [0, 1], "token_strs": None}
    asked = gateway.engine_bodies()[0]
    assert asked == {"content": "one two", "add_special": True, "parse_special": True, "with_pieces": False}
    response = await gateway.client.post("/detokenize", json={"model": "m", "tokens": [7, 8]})
    assert response.json() == {"prompt": "7 8"}


async def test_token_strings_and_special_tokens_on_llama_cpp(gateway: Gateway) -> None:
    body = {"model": "m", "prompt": "é two", "return_token_strs": True, "add_special_tokens": False}
    response = (await gateway.client.post("/tokenize", json=body)).json()
    assert (response["tokens"], response["token_strs"]) == ([0, 1], ["\ufffd", "two"])
    assert gateway.engine_bodies()[0]["add_special"] is False


async def test_llama_cpp_tokenizes_a_conversation_with_its_template(gateway: Gateway) -> None:
    messages = [{"role": "user", "content": "x y"}]
    body = {"model": "gpt-4o", "messages": messages, "tools": [], "add_special_tokens": False}
    response = await gateway.client.post("/tokenize", json=body)
    assert response.json()["count"] == 5
    rendered, split = gateway.engine_bodies()
    assert rendered == {"model": "m", "messages": messages, "tools": [], "add_special_tokens": False}
    assert (split["content"], split["add_special"]) == ("a b c x y", True)


async def test_tokens_of_vllm_pass_unchanged(gateway: Gateway) -> None:
    gateway.use_vllm()
    body = {"model": "m", "content": "one two", "add_special_tokens": False}
    assert (await gateway.client.post("/v1/tokenize", json=body)).status_code == 200
    assert gateway.engine_bodies() == [{"model": "m", "prompt": "one two", "add_special_tokens": False}]
    assert gateway.engine_log()[0].startswith("/tokenize ")

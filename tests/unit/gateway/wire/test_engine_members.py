"""Names of engines that would bypass a checked member are refused; harmless extras pass."""

from __future__ import annotations

import json
import types
from typing import Any, get_type_hints

import msgspec
import pytest

from llm_api_server.errors import InvalidRequest
from llm_api_server.gateway.wire import schemas
from llm_api_server.gateway.wire.endpoints import ENDPOINTS
from llm_api_server.gateway.wire.engine_members import ADVICE, EVERYWHERE
from llm_api_server.gateway.wire.request import read_request

USER = {"role": "user", "content": "hi"}
MINIMAL: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [USER], "max_tokens": 2},
    "/v1/completions": {"prompt": "x", "max_tokens": 2},
    "/v1/responses": {"input": "x", "max_output_tokens": 2},
    "/v1/messages": {"messages": [USER], "max_tokens": 2},
}
EVERY = [(path, name, value) for path in MINIMAL for name in EVERYWHERE for value in (1, -1, 1_000_000, "4")]
SOME: list[tuple[str, str, Any]] = [
    ("/v1/completions", "max_completion_tokens", 12),
    ("/v1/responses", "max_completion_tokens", 12),
    ("/v1/responses", "max_tokens", 12),
    ("/v1/responses", "n", 4),
    ("/v1/responses", "logprobs", 1_000_000),
    ("/v1/messages", "max_completion_tokens", 12),
    ("/v1/messages", "n", 4),
    ("/v1/messages", "logprobs", 21),
    ("/v1/messages", "logit_bias", {str(token): 1.0 for token in range(1025)}),
    ("/v1/chat/completions", "prompt_logprobs", 1000),
    ("/v1/completions", "prompt_logprobs", -1),
    ("/v1/completions", "logprobs", -1),
    ("/v1/chat/completions", "reasoning_format", "zzz"),
    ("/v1/responses", "reasoning_format", "zzz"),
    ("/v1/completions", "reasoning_format", ""),
    ("/v1/messages", "reasoning_format", 5),
]
HARMLESS: dict[str, Any] = {
    "min_p": 0.1, "top_k": 40, "chat_template_kwargs": {"enable_thinking": False}, "cache_prompt": True, "n_keep": 4,
    "repeat_penalty": 1.1, "samplers": ["top_k"], "ignore_eos": False, "mirostat": 0, "t_max_predict_ms": 1000,
    "min_tokens": 1, "truncate_prompt_tokens": 4, "reasoning_format": "deepseek", "timings_per_token": True,
}  # fmt: skip


@pytest.mark.parametrize(("path", "name", "value"), EVERY + SOME)
def test_name_that_bypasses_a_check_is_refused(path: str, name: str, value: Any) -> None:
    for body in ({**MINIMAL[path], name: value}, {**MINIMAL[path], name: value, "user": None}):
        with pytest.raises(InvalidRequest) as caught:
            read_request(ENDPOINTS[path], json.dumps(body).encode())
        assert caught.value.param == name
        assert name not in EVERYWHERE or ADVICE[name] in caught.value.message


@pytest.mark.parametrize("path", MINIMAL)
def test_escaped_name_is_refused(path: str) -> None:
    body = json.dumps({**MINIMAL[path], "n_predict": 5}).replace("n_predict", "\\u006e_predict")
    with pytest.raises(InvalidRequest):
        read_request(ENDPOINTS[path], body.encode())


@pytest.mark.parametrize("path", MINIMAL)
def test_harmless_names_pass_and_a_null_is_absent(path: str) -> None:
    assert read_request(ENDPOINTS[path], json.dumps({**MINIMAL[path], **HARMLESS}).encode()).changes == {}
    facts = read_request(ENDPOINTS[path], json.dumps({**MINIMAL[path], "n_predict": None, "n_cmpl": None}).encode())
    assert set(facts.changes) == {"n_predict", "n_cmpl"}
    assert set(facts.changes.values()) == {msgspec.UNSET}


def test_every_refused_name_has_advice() -> None:
    declared = {
        name
        for kind in (schemas.ChatRequest, schemas.CompletionRequest, schemas.ResponsesRequest, schemas.MessagesRequest)
        for name, hint in get_type_hints(kind).items()
        if hint is types.NoneType
    }
    assert set(EVERYWHERE) <= declared <= set(ADVICE)

"""Checks beyond types: limits of lists, unsupported members, and contradictory schema limits anywhere in a body."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llm_api_server.errors import InvalidRequest, NotSupported
from llm_api_server.gateway.wire.endpoints import ENDPOINTS
from llm_api_server.gateway.wire.request import read_request
from llm_api_server.gateway.wire.validation import check_schema_limits, check_supported

CHAT = ENDPOINTS["/v1/chat/completions"]
USER = {"role": "user", "content": "hi"}
REVERSED = {"type": "array", "minItems": 5, "maxItems": 2}


@pytest.mark.parametrize(
    "schema",
    [
        REVERSED,
        {"type": "string", "minLength": 3, "maxLength": 2},
        {"type": "object", "minProperties": 1.5, "maxProperties": 1},
        {"type": "array", "minItems": 0, "maxItems": 2**32 + 1},
        {"type": "array", "minItems": -1},
        {"type": "string", "pattern": "^a{5,2}$"},
        {"type": "string", "pattern": "b{1,2}a{ 500 , 20 }"},
        {"grammar": 'root ::= "a"{3,1}'},
        {"anyOf": [{"properties": {"a": {"items": REVERSED}}}]},
    ],
)
def test_contradictory_schema_limits_are_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="Invalid schema") as caught:
        check_schema_limits({"x": [schema]})
    assert (caught.value.param or "").startswith("x[0]")


def test_schema_limits_behind_escaped_keys_are_found() -> None:
    body = json.dumps({"messages": [USER], "json_schema": REVERSED})
    with pytest.raises(InvalidRequest, match="Invalid schema"):
        read_request(CHAT, body.replace("min", "\\u006din").replace("max", "\\u006dax").encode())


@pytest.mark.parametrize(
    "member",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": REVERSED}}},
        {"response_format": {"type": "json_object", "schema": REVERSED}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": REVERSED}}]},
        {"json_schema": REVERSED},
        {"grammar": 'root ::= "a"{3,1}'},
    ],
)
def test_contradictory_limits_are_refused_wherever_they_stand(member: dict[str, Any]) -> None:
    body = {"messages": [USER], **member}
    with pytest.raises(InvalidRequest):
        read_request(CHAT, json.dumps(body).encode())


@pytest.mark.parametrize(
    "schema",
    [
        {"minItems": 2, "maxItems": 2},
        {"minLength": 2},
        {"properties": {"minItems": {"type": "integer"}, "maxItems": {"type": "string"}}},
        {"minItems": "5", "maxItems": True},  # the engine refuses these itself
        {"pattern": "^[0-9]{2,4}-[0-9]{3}$"},
        {"pattern": 5},
    ],
)
def test_reachable_schema_limits_pass(schema: dict[str, Any]) -> None:
    check_schema_limits(schema)


@pytest.mark.parametrize(
    ("path", "most", "param"),
    [
        ("/v1/completions", {"prompt": ["x"] * 256}, "prompt"),
        ("/v1/completions", {"prompt": "x", "stop": ["x"] * 64}, "stop"),
        ("/v1/chat/completions", {"messages": [USER], "stop": ["x"] * 64}, "stop"),
        ("/v1/chat/completions", {"messages": [USER], "stop": "x" * 4096}, "stop"),
        (
            "/v1/chat/completions",
            {"messages": [USER], "logit_bias": dict.fromkeys(map(str, range(1024)), 1)},
            "logit_bias",
        ),
        ("/v1/messages", {"messages": [USER], "max_tokens": 1, "stop_sequences": ["x"] * 64}, "stop_sequences"),
    ],
)
def test_costly_lists_have_a_limit(path: str, most: dict[str, Any], param: str) -> None:
    read_request(ENDPOINTS[path], json.dumps(most).encode())
    value = most[param]
    more = {**value, "one more": 1} if isinstance(value, dict) else value + value[:1]
    with pytest.raises(InvalidRequest) as caught:
        read_request(ENDPOINTS[path], json.dumps({**most, param: more}).encode())
    assert caught.value.param == param


def test_a_list_of_numbers_is_one_prompt() -> None:
    read_request(ENDPOINTS["/v1/completions"], json.dumps({"prompt": list(range(5000))}).encode())


@pytest.mark.parametrize("field", [{"echo": True}, {"suffix": "x"}, {"best_of": 3}])
def test_members_that_llama_cpp_would_ignore_are_refused(field: dict[str, Any]) -> None:
    facts = read_request(ENDPOINTS["/v1/completions"], json.dumps({"prompt": "x", **field}).encode())
    with pytest.raises(NotSupported) as caught:
        check_supported(facts.request, "llama_cpp")
    assert caught.value.param == next(iter(field))
    check_supported(facts.request, "vllm")

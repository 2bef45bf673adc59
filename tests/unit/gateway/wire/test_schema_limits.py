"""Bounds that no engine may see, wherever in a body they are hidden."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llm_api_server.errors import InvalidRequest
from llm_api_server.gateway.wire.request import ENDPOINTS, read_request
from llm_api_server.gateway.wire.schema_limits import check_bounds

CHAT = ENDPOINTS["/v1/chat/completions"]
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
def test_contradictions_are_the_clients_fault(schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="Invalid schema") as caught:
        check_bounds({"x": [schema]})
    assert (caught.value.param or "").startswith("x[0]")


def test_an_escaped_key_hides_nothing() -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "json_schema": REVERSED})
    with pytest.raises(InvalidRequest, match="Invalid schema"):
        read_request(CHAT, body.replace("min", "\\u006din").replace("max", "\\u006dax").encode())


@pytest.mark.parametrize(
    "place",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": REVERSED}}},
        {"response_format": {"type": "json_object", "schema": REVERSED}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": REVERSED}}]},
        {"json_schema": REVERSED},
        {"grammar": 'root ::= "a"{3,1}'},
    ],
)
def test_no_request_gets_one_past(place: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], **place}
    with pytest.raises(InvalidRequest):
        read_request(CHAT, json.dumps(body).encode())


@pytest.mark.parametrize(
    "schema",
    [
        {"minItems": 2, "maxItems": 2},
        {"minLength": 2},
        {"properties": {"minItems": {"type": "integer"}, "maxItems": {"type": "string"}}},
        {"minItems": "5", "maxItems": True},  # the engine says what is wrong with these
        {"pattern": "^[0-9]{2,4}-[0-9]{3}$"},
        {"pattern": 5},
    ],
)
def test_what_can_be_met_passes(schema: dict[str, Any]) -> None:
    check_bounds(schema)

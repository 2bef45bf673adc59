"""Reading requests: any bytes give facts, or an `InvalidRequest` with its `param`."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_api_server.errors import InvalidRequest
from llm_api_server.gateway.wire.endpoints import ENDPOINTS
from llm_api_server.gateway.wire.request import RequestFacts, read_request
from llm_api_server.gateway.wire.rewrite import rewrite

JSON_PATHS = sorted(path for path, endpoint in ENDPOINTS.items() if endpoint.request is not None)
CHAT = ENDPOINTS["/v1/chat/completions"]
USER = {"role": "user", "content": "hi"}

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(
    ["model", "messages", "prompt", "input", "stream", "stream_options", "max_tokens", "n", "temperature", "tools",
     "tool_choice", "response_format", "documents", "query", "logprobs", "stop", "system", "content", "tokens",
     "text_1", "image_url", "queries"]
)  # fmt: skip
messages = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "system", "developer", "assistant"]) | scalars,
            "content": st.lists(
                st.fixed_dictionaries(
                    {"type": st.sampled_from(["text", "image_url", "image", "input_audio"])},
                    optional={"text": scalars, "image_url": values, "source": values, "input_audio": values},
                ),
                max_size=2,
            )
            | values,
        },
    ),
    max_size=2,
)
patient = settings(suppress_health_check=[HealthCheck.too_slow])  # busy machines draw slowly
bodies = st.dictionaries(names, values | messages, max_size=6)


def read_or_refuse(path: str, raw: bytes) -> RequestFacts | None:
    """Return None for a refusal that a client can use; any other exception fails the test."""
    try:
        return read_request(ENDPOINTS[path], raw)
    except InvalidRequest as error:
        if not error.message or not isinstance(error.param, str | None):
            raise
        return None


@patient
@given(path=st.sampled_from(JSON_PATHS), body=bodies)
def test_any_object_gives_facts_or_a_client_error(path: str, body: dict[str, Any]) -> None:
    raw = json.dumps(body).encode()
    facts = read_or_refuse(path, raw)
    if facts is not None:
        assert facts.request is not None
        assert json.loads(rewrite(raw, {"model": "x"})) == {**body, "model": "x"}


@patient
@given(path=st.sampled_from(JSON_PATHS), raw=st.binary(max_size=60))
def test_any_bytes_give_facts_or_a_client_error(path: str, raw: bytes) -> None:
    assert read_or_refuse(path, raw) is None or json.loads(raw) is not None


@pytest.mark.parametrize(
    ("body", "stream", "is_set"),
    [
        ({}, True, False),
        ({"stream": None}, True, False),
        ({"stream": False}, False, True),
        ({"stream": True}, True, True),
    ],
)
def test_stream_by_default_fills_in_an_absent_member(body: dict[str, Any], stream: bool, is_set: bool) -> None:
    facts = read_request(CHAT, json.dumps({"messages": [USER], **body}).encode(), stream_by_default=True)
    assert (facts.stream, facts.is_stream_set) == (stream, is_set)


def test_max_completion_tokens_overrides_max_tokens() -> None:
    facts = read_request(CHAT, json.dumps({"messages": [USER], "max_tokens": 5, "max_completion_tokens": 9}).encode())
    assert facts.max_tokens == 9

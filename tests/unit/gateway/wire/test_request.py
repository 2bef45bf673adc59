"""What is read of requests: any bytes give facts or a 400 with its place, and rewriting keeps the rest."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_api_server.errors import InvalidRequest, NotSupported
from llm_api_server.gateway.wire import request
from llm_api_server.gateway.wire.request import ENDPOINTS, RequestFacts, read_request, rewrite

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
    """None for a refusal as a client can use it; any other exception is the test's failure."""
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


@patient
@given(body=bodies, changes=st.dictionaries(names, values, max_size=3))
def test_rewriting_changes_only_what_it_is_told(body: dict[str, Any], changes: dict[str, Any]) -> None:
    assert json.loads(rewrite(json.dumps(body).encode(), changes)) == {**body, **changes}


def test_a_member_is_put_behind_the_others_unless_it_may_be_there() -> None:
    assert rewrite(b'{"a": 1 }\n', {"b": [2]}) == b'{"a": 1 ,"b":[2]}'
    assert rewrite(b"{ }", {"b": 2}) == b'{"b":2}'
    assert rewrite(b'{"\\u0062": 1}', {"b": 2}) == b'{"b":2}'
    assert rewrite(b'{"a": "b"}', {"b": 2}) == b'{"a":"b","b":2}'


def test_rewriting_keeps_the_bytes_of_what_it_does_not_touch() -> None:
    raw = b'{"model":"a", "x": {"y" : 1.500e0, "z":"\\u00e9"}}'
    assert rewrite(raw, {"model": "b"}) == b'{"model":"b","x":{"y" : 1.500e0, "z":"\\u00e9"}}'
    assert rewrite(raw, {"x": msgspec.UNSET}) == b'{"model":"a"}'
    assert rewrite(raw, {}) is raw


@pytest.mark.parametrize(
    ("body", "stream", "says"),
    [
        ({}, True, False),
        ({"stream": None}, True, False),
        ({"stream": False}, False, True),
        ({"stream": True}, True, True),
    ],
)
def test_stream_by_default(body: dict[str, Any], stream: bool, says: bool) -> None:
    facts = read_request(CHAT, json.dumps({"messages": [USER], **body}).encode(), stream_by_default=True)
    assert (facts.stream, facts.says_stream) == (stream, says)


def test_max_completion_tokens_wins() -> None:
    facts = read_request(CHAT, json.dumps({"messages": [USER], "max_tokens": 5, "max_completion_tokens": 9}).encode())
    assert facts.max_tokens == 9


def test_only_the_developer_role_is_changed() -> None:
    raw = b'{"messages":[{"role":"developer","content":"a", "n": 1.0},{"role":"user","content":"b"}]}'
    changed = rewrite(raw, request.developer_changes(read_request(CHAT, raw), raw))
    assert changed == b'{"messages":[{"role":"system","content":"a","n":1.0},{"role":"user","content":"b"}]}'
    plain = b'{"messages":[{"role":"user","content":"developer"}]}'
    assert request.developer_changes(read_request(CHAT, plain), plain) == {}


def test_asking_for_usage_keeps_the_other_options() -> None:
    raw = (
        b'{"messages":[{"role":"user","content":"a"}],"stream":true,'
        b'"stream_options":{"continuous_usage_stats":true,"include_usage":false}}'
    )
    plain = b'{"messages":[{"role":"user","content":"a"}],"stream":true}'
    assert request.ask_for_usage(read_request(CHAT, raw), raw) == {
        "continuous_usage_stats": True,
        "include_usage": True,
    }
    assert request.ask_for_usage(read_request(CHAT, plain), plain) == {"include_usage": True}


def test_tokenize_speaks_each_engines_dialect() -> None:
    facts = read_request(ENDPOINTS["/tokenize"], b'{"content":"x"}')
    assert request.tokenize_changes(facts, "vllm") == {"prompt": "x", "content": msgspec.UNSET}
    assert request.tokenize_changes(facts, "remote") == {}
    assert request.upstream_path(ENDPOINTS["/v1/tokenize"], "vllm") == "/tokenize"
    assert request.upstream_path(ENDPOINTS["/v2/rerank"], "llama_cpp") == "/v1/rerank"


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
def test_lists_that_cost_an_engine_much_have_a_limit(path: str, most: dict[str, Any], param: str) -> None:
    read_request(ENDPOINTS[path], json.dumps(most).encode())
    value = most[param]
    more = {**value, "one more": 1} if isinstance(value, dict) else value + value[:1]
    with pytest.raises(InvalidRequest) as caught:
        read_request(ENDPOINTS[path], json.dumps({**most, param: more}).encode())
    assert caught.value.param == param


def test_a_prompt_of_many_numbers_is_one() -> None:
    read_request(ENDPOINTS["/v1/completions"], json.dumps({"prompt": list(range(5000))}).encode())


@pytest.mark.parametrize("field", [{"echo": True}, {"suffix": "x"}, {"best_of": 3}])
def test_what_llama_cpp_would_ignore_is_refused(field: dict[str, Any]) -> None:
    facts = read_request(ENDPOINTS["/v1/completions"], json.dumps({"prompt": "x", **field}).encode())
    with pytest.raises(NotSupported) as caught:
        request.check_supported(facts, "llama_cpp")
    assert caught.value.param == next(iter(field))
    request.check_supported(facts, "vllm")

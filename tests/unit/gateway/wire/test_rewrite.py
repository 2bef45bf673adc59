"""Changes to request bodies: the changed members change, all others keep their bytes."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_api_server.gateway.wire.endpoints import ENDPOINTS
from llm_api_server.gateway.wire.request import read_request
from llm_api_server.gateway.wire.rewrite import developer_changes, rewrite, tokenize_changes, with_usage_included

CHAT = ENDPOINTS["/v1/chat/completions"]

names = st.sampled_from(["model", "messages", "stream", "stream_options", "prompt", "content"]) | st.text(max_size=5)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.too_slow])  # busy machines draw slowly
@given(body=st.dictionaries(names, values, max_size=6), changes=st.dictionaries(names, values, max_size=3))
def test_rewriting_changes_only_the_given_members(body: dict[str, Any], changes: dict[str, Any]) -> None:
    assert json.loads(rewrite(json.dumps(body).encode(), changes)) == {**body, **changes}


def test_rewriting_appends_a_member_that_is_certainly_absent() -> None:
    assert rewrite(b'{"a": 1 }\n', {"b": [2]}) == b'{"a": 1 ,"b":[2]}'
    assert rewrite(b"{ }", {"b": 2}) == b'{"b":2}'
    assert rewrite(b'{"\\u0062": 1}', {"b": 2}) == b'{"b":2}'
    assert rewrite(b'{"a": "b"}', {"b": 2}) == b'{"a":"b","b":2}'


def test_rewriting_keeps_the_bytes_of_unchanged_members() -> None:
    raw = b'{"model":"a", "x": {"y" : 1.500e0, "z":"\\u00e9"}}'
    assert rewrite(raw, {"model": "b"}) == b'{"model":"b","x":{"y" : 1.500e0, "z":"\\u00e9"}}'
    assert rewrite(raw, {"x": msgspec.UNSET}) == b'{"model":"a"}'
    assert rewrite(raw, {}) is raw


def test_only_the_developer_role_is_renamed() -> None:
    raw = b'{"messages":[{"role":"developer","content":"a", "n": 1.0},{"role":"user","content":"b"}]}'
    changed = rewrite(raw, developer_changes(read_request(CHAT, raw), raw))
    assert changed == b'{"messages":[{"role":"system","content":"a","n":1.0},{"role":"user","content":"b"}]}'
    plain = b'{"messages":[{"role":"user","content":"developer"}]}'
    assert developer_changes(read_request(CHAT, plain), plain) == {}


def test_including_usage_keeps_the_other_stream_options() -> None:
    raw = (
        b'{"messages":[{"role":"user","content":"a"}],"stream":true,'
        b'"stream_options":{"continuous_usage_stats":true,"include_usage":false}}'
    )
    plain = b'{"messages":[{"role":"user","content":"a"}],"stream":true}'
    assert with_usage_included(read_request(CHAT, raw), raw) == {"continuous_usage_stats": True, "include_usage": True}
    assert with_usage_included(read_request(CHAT, plain), plain) == {"include_usage": True}


def test_vllm_gets_the_text_to_tokenize_under_its_own_name() -> None:
    facts = read_request(ENDPOINTS["/tokenize"], b'{"content":"x"}')
    assert tokenize_changes(facts, "vllm") == {"prompt": "x", "content": msgspec.UNSET}
    assert tokenize_changes(facts, "remote") == {}

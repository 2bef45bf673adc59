"""Forms that engines refuse or misread are changed before an engine sees them; other bodies keep their bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llm_api_server.errors import InvalidRequest
from llm_api_server.gateway.wire.endpoints import ENDPOINTS
from llm_api_server.gateway.wire.request import RequestFacts, read_request
from llm_api_server.gateway.wire.rewrite import rewrite

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
USER = {"role": "user", "content": "hi"}
MINIMAL: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [USER]},
    COMPLETIONS: {"prompt": "x", "max_tokens": 5},
    RESPONSES: {"input": "x"},
    MESSAGES: {"messages": [USER], "max_tokens": 5},
    "/v1/embeddings": {"input": "x"},
    "/v1/rerank": {"query": "x", "documents": ["y"]},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [1]},
}


def read(path: str, body: dict[str, Any]) -> tuple[RequestFacts, dict[str, Any]]:
    """Return the facts of a request and the body that engines get."""
    raw = json.dumps(body).encode()
    facts = read_request(ENDPOINTS[path], raw)
    return facts, json.loads(rewrite(raw, facts.changes))


def refused(path: str, body: dict[str, Any]) -> tuple[str, str | None]:
    with pytest.raises(InvalidRequest) as caught:
        read(path, body)
    return caught.value.message, caught.value.param


@pytest.mark.parametrize("path", MINIMAL)
def test_plain_body_keeps_its_bytes(path: str) -> None:
    raw = json.dumps({**MINIMAL[path], "top_k": 40, "min_p": 0.1, "chat_template_kwargs": {"a": 1}}).encode()
    assert rewrite(raw, read_request(ENDPOINTS[path], raw).changes) is raw


@pytest.mark.parametrize(
    ("path", "name"),
    [(CHAT, "stop"), (COMPLETIONS, "stop"), (RESPONSES, "stop"), (MESSAGES, "stop"), (MESSAGES, "stop_sequences")],
)
@pytest.mark.parametrize("stream", [False, True])
class TestStops:
    @pytest.mark.parametrize("given", ["", [""], ["", ""], []])
    def test_empty_ones_are_left_out(self, path: str, name: str, given: Any, *, stream: bool) -> None:
        if name == "stop_sequences" and given == "":
            pytest.skip("a list only")
        body = {**MINIMAL[path], "stream": stream}
        assert read(path, {**body, name: given})[1] == body

    @pytest.mark.parametrize(("given", "kept"), [(["", "a"], ["a"]), (["a", "", " "], ["a", " "])])
    def test_others_hold(self, path: str, name: str, given: Any, kept: Any, *, stream: bool) -> None:
        body = {**MINIMAL[path], "stream": stream}
        facts, sent = read(path, {**body, name: given})
        assert sent == {**body, name: kept}
        assert getattr(facts.request, name) == kept

    def test_too_many_or_too_long_ones_are_refused(self, path: str, name: str, *, stream: bool) -> None:
        body = {**MINIMAL[path], "stream": stream}
        assert refused(path, {**body, name: ["a"] * 65})[1] == name
        assert refused(path, {**body, name: ["a" * 5000]})[1] == f"{name}[0]"


class TestNulls:
    @pytest.mark.parametrize("path", MINIMAL)
    def test_top_level_ones_are_absent(self, path: str) -> None:
        request = ENDPOINTS[path].request
        assert request is not None
        declared = {name: None for name in request.__struct_fields__ if name not in MINIMAL[path]}
        assert read(path, {**MINIMAL[path], **declared, "top_k": None, "reasoning_effort": None})[1] == MINIMAL[path]

    def test_nested_ones_are_absent_where_they_are_nullable(self) -> None:
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        said = {"role": "assistant", "content": None, "tool_calls": [call]}
        replayed = {**said, "refusal": None, "name": None, "audio": None, "function_call": None}
        function = {"name": "f", "parameters": {"properties": {"a": {"default": None, "enum": [None, 1]}}}}
        tool = {"type": "function", "function": function}
        body = {"messages": [USER, said], "tools": [tool], "stream": True, "stream_options": {}}
        sent = read(
            CHAT,
            {
                "messages": [{**USER, "tool_calls": None}, replayed],
                "tools": [{**tool, "function": {**function, "strict": None, "description": None}}],
                "stream": True,
                "stream_options": {"include_usage": None},
            },
        )[1]
        assert sent == body

    def test_null_for_a_required_member_is_a_missing_one(self) -> None:
        assert refused(CHAT, {"messages": None}) == ("Missing required parameter: 'messages'.", "messages")
        assert refused(MESSAGES, {**MINIMAL[MESSAGES], "max_tokens": None})[1] == "max_tokens"
        assert refused("/v1/embeddings", {"input": None})[1] == "input"

    def test_the_word_in_a_text_changes_nothing(self) -> None:
        raw = b'{ "messages": [{"role":"user","content":"null and \\"stop\\": null"}], "temperature": 1.50 }'
        assert read_request(ENDPOINTS[CHAT], raw).changes == {}


class TestWholeNumbers:
    @pytest.mark.parametrize(
        ("path", "name", "value"),
        [
            (CHAT, "max_tokens", 8.0), (CHAT, "seed", 1.0), (CHAT, "n", 2.0), (CHAT, "max_completion_tokens", 8e0),
            (COMPLETIONS, "max_tokens", 8.0), (COMPLETIONS, "logprobs", 2.0), (MESSAGES, "max_tokens", 8.0),
            (RESPONSES, "max_output_tokens", 8.0), ("/v1/rerank", "top_n", 1.0), ("/v1/embeddings", "dimensions", 8.0),
        ],
    )  # fmt: skip
    def test_count_as_integers(self, path: str, name: str, value: float) -> None:
        facts, sent = read(path, {**MINIMAL[path], name: value})
        assert sent[name] == value
        assert isinstance(sent[name], int)
        assert getattr(facts.request, name) == value

    def test_in_lists_and_long_bodies(self) -> None:
        assert read("/detokenize", {"tokens": [1.0, 2]})[1] == {"tokens": [1, 2]}
        assert read(COMPLETIONS, {"prompt": [[1.0]], "max_tokens": 1})[1]["prompt"] == [[1]]
        long = {"messages": [{"role": "user", "content": "x" * 20_000}], "max_tokens": 8.0}
        assert read(CHAT, long)[0].max_tokens == 8

    @pytest.mark.parametrize("value", [8.5, 1e300, -1.0, "8", True])
    def test_others_are_refused(self, value: Any) -> None:
        assert refused(CHAT, {**MINIMAL[CHAT], "max_tokens": value})[1] == "max_tokens"

    def test_numbers_that_may_have_fractions_stay(self) -> None:
        raw = b'{"prompt":"x","max_tokens":1.0,"temperature":1.0,"x":2.0}'
        changed = rewrite(raw, read_request(ENDPOINTS[COMPLETIONS], raw).changes)
        assert changed == b'{"prompt":"x","max_tokens":1,"temperature":1.0,"x":2.0}'


class TestCompletionTokens:
    def test_default_is_16_and_is_accounted(self) -> None:
        for body in ({"prompt": "x"}, {"prompt": "x", "max_tokens": None}, {"prompt": ["x", "y"], "stream": True}):
            facts, sent = read(COMPLETIONS, body)
            assert (facts.max_tokens, sent["max_tokens"]) == (16, 16)
        assert read(CHAT, MINIMAL[CHAT])[0].max_tokens is None

    def test_none_need_echo(self) -> None:
        for more in ({}, {"echo": False}, {"echo": None}, {"stream": True}):
            assert refused(COMPLETIONS, {"prompt": "x", "max_tokens": 0, **more})[1] == "max_tokens"
        assert read(COMPLETIONS, {"prompt": "x", "max_tokens": 0, "echo": True})[0].max_tokens == 0


def history(arguments: Any) -> dict[str, Any]:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]}


class TestReplayedMessages:
    @pytest.mark.parametrize("given", ["", " \n", None, "null"])
    def test_call_without_arguments_gets_an_empty_object(self, given: Any) -> None:
        assert read(CHAT, history(given))[1] == history("{}")
        item = {"type": "function_call", "call_id": "1", "name": "f", "arguments": given}
        assert read(RESPONSES, {"input": [item]})[1] == {"input": [{**item, "arguments": "{}"}]}

    @pytest.mark.parametrize("given", ["{}", ' {"city": "Paris"}', '{"a": {"b": [1, null]}}', {"a": 1}])
    def test_readable_arguments_stay(self, given: Any) -> None:
        raw = json.dumps(history(given)).encode()
        assert rewrite(raw, read_request(ENDPOINTS[CHAT], raw).changes) is raw or "null" in str(given)
        assert read(CHAT, history(given))[1] == history(given)

    @pytest.mark.parametrize(
        "given",
        ['{"city": "', '{"a":1,}', '{"a":1}{"b":2}', "{'a': 1}", '{"a": NaN}', '{"a": "x\ny"}', "[]", "5", '"x"', 5, [],
         '{"a":' + "[" * 50_000],
    )  # fmt: skip
    def test_unreadable_arguments_are_refused_with_their_place(self, given: Any) -> None:
        message, param = refused(CHAT, history(given))
        assert param == "messages[1].tool_calls[0].function.arguments"
        assert "JSON object" in message
        item = {"type": "function_call", "call_id": "1", "name": "f", "arguments": given}
        assert refused(RESPONSES, {"input": [item]})[1] == "input[0].arguments"

    def test_refusal_becomes_text(self) -> None:
        parts = [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "No."}]
        sent = read(CHAT, {"messages": [USER, {"role": "assistant", "content": parts}], "stop": ""})[1]
        text = {"type": "text", "text": "No."}
        assert sent == {"messages": [USER, {"role": "assistant", "content": [parts[0], text]}]}
        wrong = {"messages": [{"role": "assistant", "content": [{"type": "refusal"}]}]}
        assert refused(CHAT, wrong)[1] == "messages[0].content[0].refusal"

    def test_custom_calls_and_other_members_stay(self) -> None:
        call = {"id": "1", "type": "custom", "custom": {"name": "f", "input": "x y"}}
        body = {"messages": [{"role": "assistant", "content": None, "tool_calls": [call], "extra": 1.5}]}
        assert read(CHAT, body)[1] == body

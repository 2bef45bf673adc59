"""A forced choice becomes a schema, and the output becomes tool calls, wherever reads and tokens are cut."""

from __future__ import annotations

import itertools
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_api_server.errors import EngineError, InvalidRequest
from llm_api_server.gateway.tools.forced_tool_choice import (
    CallReader,
    ForcedCallStream,
    call_schema,
    changes,
    is_forced,
)
from llm_api_server.gateway.wire.endpoints import ENDPOINTS
from llm_api_server.gateway.wire.request import RequestFacts, read_request
from llm_api_server.gateway.wire.rewrite import rewrite
from llm_api_server.gateway.wire.stream_assembler import StreamAssembler
from llm_api_server.ipc.usage_events import Usage

CHAT = ENDPOINTS["/v1/chat/completions"]
USER = {"role": "user", "content": "Weather in Paris?"}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "get_time"}},
]
NAMED = {"type": "function", "function": {"name": "get_time"}}
USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}

words = st.text(max_size=12)
arguments = st.dictionaries(
    words, words | st.integers(-99, 99) | st.lists(words, max_size=2) | st.fixed_dictionaries({"x": words}), max_size=3
)
calls = st.lists(st.tuples(st.text("abc_-", min_size=1, max_size=9), arguments), min_size=1, max_size=3)
cuts = st.lists(st.integers(0, 5000), max_size=12)
indents = st.sampled_from([None, 0, 4])


def body(**more: Any) -> bytes:
    return json.dumps({"messages": [USER], "tools": TOOLS, "tool_choice": "required", **more}).encode()


def facts(raw: bytes) -> RequestFacts:
    return read_request(CHAT, raw)


def rewritten(raw: bytes, *, knows_tools: bool = False) -> dict[str, Any]:
    return dict(json.loads(rewrite(raw, changes(facts(raw), raw, knows_tools=knows_tools))))


def schema_of(request: dict[str, Any]) -> dict[str, Any]:
    assert request["response_format"]["type"] == "json_schema"
    return dict(request["response_format"]["json_schema"]["schema"])


def pieces(text: str, offsets: list[int]) -> list[str]:
    ends = sorted({0, len(text), *(offset % (len(text) + 1) for offset in offsets)})
    return [text[start:end] for start, end in itertools.pairwise(ends)]


class TestRequest:
    @pytest.mark.parametrize(
        ("choice", "forced"),
        [("required", True), (NAMED, True), ("auto", False), ("none", False), (None, False)],
    )
    def test_required_and_named_choices_are_forced(self, choice: Any, forced: bool) -> None:
        assert is_forced(facts(body(tool_choice=choice))) is forced

    def test_other_endpoints_and_kinds_of_tools_are_not_forced(self) -> None:
        custom = [*TOOLS, {"type": "custom", "custom": {"name": "x"}}]
        assert not is_forced(facts(body(tools=custom)))
        assert not is_forced(read_request(ENDPOINTS["/v1/completions"], b'{"prompt": "x"}'))

    def test_a_required_call_may_be_any_function(self) -> None:
        schema = schema_of(rewritten(body()))
        assert [call["properties"]["name"] for call in schema["anyOf"]] == [
            {"const": "get_weather"}, {"const": "get_time"},
        ]  # fmt: skip
        assert schema["anyOf"][0]["properties"]["arguments"] == CITY
        assert all(list(call["properties"]) == ["name", "arguments"] for call in schema["anyOf"])

    def test_a_named_function_is_the_only_choice(self) -> None:
        request = rewritten(body(tool_choice=NAMED, parallel_tool_calls=True))
        assert schema_of(request)["properties"]["name"] == {"const": "get_time"}
        assert schema_of(request)["properties"]["arguments"]["additionalProperties"] is False
        assert "get_weather" not in request["messages"][0]["content"]

    def test_several_calls_are_allowed_on_express_wish_only(self) -> None:
        assert "anyOf" in schema_of(rewritten(body(parallel_tool_calls=False)))
        schema = schema_of(rewritten(body(parallel_tool_calls=True)))
        assert (schema["type"], schema["minItems"]) == ("array", 1)

    def test_a_template_that_knows_tools_keeps_them(self) -> None:
        request = rewritten(body(), knows_tools=True)
        assert (request["tools"], request["tool_choice"], request["messages"]) == (TOOLS, "none", [USER])

    def test_without_such_a_template_a_system_message_describes_the_tools(self) -> None:
        request = rewritten(body())
        system, user = request["messages"]
        assert system["role"] == "system"
        assert json.dumps(TOOLS[0]["function"], separators=(",", ":")) in system["content"]
        assert user == USER
        assert not {"tools", "tool_choice", "parallel_tool_calls"} & set(request)

    @pytest.mark.parametrize("role", ["system", "developer"])
    def test_the_description_follows_the_clients_own_system_message(self, role: str) -> None:
        (system, _) = rewritten(body(messages=[{"role": role, "content": "Be brief."}, USER]))["messages"]
        assert system["role"] == role
        assert system["content"].startswith("Be brief.\n\n")
        parts = [{"type": "text", "text": "Be brief."}]
        (system, _) = rewritten(body(messages=[{"role": role, "content": parts}, USER]))["messages"]
        assert system["content"][0] == parts[0]
        assert "get_weather" in system["content"][1]["text"]

    def test_local_references_still_resolve(self) -> None:
        leaf = {"enum": ["a", "b"]}
        tree = {
            "type": "object",
            "properties": {"leaf": {"$ref": "#/$defs/Leaf"}, "children": {"type": "array", "items": {"$ref": "#"}}},
            "$defs": {"Leaf": leaf},
        }
        schema = call_schema([{"name": "f", "parameters": CITY}, {"name": "g", "parameters": tree}], several=False)
        reference = schema["anyOf"][1]["properties"]["arguments"]["$ref"]
        moved = resolve(schema, reference)
        assert resolve(schema, moved["properties"]["leaf"]["$ref"]) == leaf
        assert resolve(schema, moved["properties"]["children"]["items"]["$ref"]) == moved

    def test_too_deep_parameters_are_refused(self) -> None:
        deep = '{"$ref": "#", "not": ' + '{"not":' * 600 + "{}" + "}" * 601
        raw = body().replace(json.dumps(CITY).encode(), deep.encode())
        with pytest.raises(InvalidRequest) as caught:
            changes(facts(raw), raw, knows_tools=False)
        assert caught.value.param == "tools"


def resolve(document: dict[str, Any], reference: str) -> Any:
    target: Any = document
    for step in reference.removeprefix("#/").split("/"):
        target = target[step]
    return target


class TestCallReader:
    @given(calls=calls, cuts=cuts, indent=indents, is_list=st.booleans())
    def test_calls_are_read_wherever_the_text_is_cut(
        self, calls: list[tuple[str, Any]], cuts: list[int], indent: int | None, is_list: bool
    ) -> None:
        objects = [{"name": name, "arguments": values} for name, values in calls]
        wanted = objects if is_list else objects[:1]
        text = json.dumps(wanted if is_list else wanted[0], indent=indent)
        reader = CallReader()
        names: list[str] = []
        texts: list[str] = []
        for piece in pieces(f"\n{text} \n", cuts):
            for index, name, more in reader.feed(piece):
                if name is not None:
                    names.append(name)
                    texts.append("")
                assert index == len(names) - 1
                texts[index] += more
        assert reader.is_complete
        assert names == [call["name"] for call in wanted]
        assert [json.loads(one) for one in texts] == [call["arguments"] for call in wanted]

    @given(cut=st.integers(0, 60))
    def test_truncated_text_is_incomplete_and_no_error(self, cut: int) -> None:
        text = '[{"name": "f", "arguments": {"a": "}]\\"", "b": {}}}]'
        reader = CallReader()
        reader.feed(text[:cut])
        assert reader.is_complete is (cut >= len(text))

    @pytest.mark.parametrize(
        "text",
        [
            "Paris",
            '{"name": "f", "arguments": "x"}',
            '{"name": "f", "arguments": {}} x',
            '[{"name": "f", "arguments": {}};',
        ],
    )
    def test_other_text_is_an_engine_error(self, text: str) -> None:
        with pytest.raises(EngineError):
            CallReader().feed(text)


def chunk(delta: dict[str, Any], finish: str | None = None, index: int = 0) -> bytes:
    choice = {"index": index, "delta": delta, "finish_reason": finish}
    return event({"id": "c-1", "object": "chat.completion.chunk", "choices": [choice]})


def event(content: Any) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def output(text: str, offsets: list[int], finish: str = "stop") -> bytes:
    head = chunk({"role": "assistant", "content": ""})
    middle = b"".join(chunk({"content": piece}) for piece in pieces(text, offsets))
    usage = event({"id": "c-1", "object": "chat.completion.chunk", "choices": [], "usage": USAGE})
    return head + middle + chunk({}, finish) + usage + b"data: [DONE]\n\n"


def relayed(stream: bytes, offsets: list[int], *, show_usage: bool = False) -> tuple[ForcedCallStream, bytes]:
    reader = ForcedCallStream(show_usage=show_usage, choices=1)
    ends = sorted({0, len(stream), *(offset % (len(stream) + 1) for offset in offsets)})
    out = [reader.feed(stream[start:end]) for start, end in itertools.pairwise(ends)]
    return reader, b"".join([*out, reader.flush()])


def chunks_of(stream: bytes) -> list[dict[str, Any]]:
    payloads = [part.removeprefix(b"data: ") for part in stream.split(b"\n\n") if part]
    assert payloads[-1] == b"[DONE]"
    return [json.loads(payload) for payload in payloads[:-1]]


CALL = '{\n "name": "get_weather",\n "arguments": {"city": "Paris \\"}\\" é"}\n}'


class TestStream:
    @given(tokens=cuts, reads=cuts)
    def test_the_client_gets_openais_tool_call_deltas(self, tokens: list[int], reads: list[int]) -> None:
        reader, out = relayed(output(CALL, tokens), reads)
        chunks = chunks_of(out)
        assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert not any(delta.get("content") for delta in deltas)
        parts = [call for delta in deltas for call in delta.get("tool_calls", [])]
        assert (parts[0]["index"], parts[0]["type"], parts[0]["function"]["name"]) == (0, "function", "get_weather")
        assert parts[0]["id"].startswith("call_")
        assert all(set(part) == {"index", "function"} for part in parts[1:])
        text = "".join(part["function"]["arguments"] for part in parts)
        assert json.loads(text) == {"city": 'Paris "}" é'}
        reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
        assert reasons[-1] == "tool_calls"
        assert set(reasons[:-1]) <= {None}
        assert reader.usage == Usage(3, 4)

    @given(tokens=cuts)
    def test_requested_usage_is_sent(self, tokens: list[int]) -> None:
        _, out = relayed(output(CALL, tokens), [], show_usage=True)
        assert chunks_of(out)[-1]["usage"] == USAGE

    @given(tokens=cuts)
    def test_a_json_body_is_assembled_from_the_calls(self, tokens: list[int]) -> None:
        two = f"[{CALL}, {CALL}]"
        _, out = relayed(output(two, tokens), [])
        assembler = StreamAssembler("openai")
        assembler.feed(out)
        (choice,) = json.loads(assembler.body())["choices"]
        assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
        first, second = choice["message"]["tool_calls"]
        assert first["id"] != second["id"]
        assert first["function"] == second["function"]

    @given(cut=st.integers(0, len(CALL) - 1))
    def test_a_call_truncated_by_max_tokens_ends_with_length(self, cut: int) -> None:
        reader, out = relayed(output(CALL[:cut], [], "length"), [])
        assert reader.failed is None
        assert chunks_of(out)[-1]["choices"][0]["finish_reason"] == "length"

    def test_choices_do_not_mix(self) -> None:
        stream = b"".join(
            chunk({"content": piece}, index=index) for piece in pieces(CALL, [7, 31, 44]) for index in (0, 1)
        )
        reader = ForcedCallStream(show_usage=False, choices=2)
        out = reader.feed(stream + chunk({}, "stop", 0) + chunk({}, "stop", 1) + b"data: [DONE]\n\n")
        assembler = StreamAssembler("openai")
        assembler.feed(out)
        first, second = json.loads(assembler.body())["choices"]
        assert first["message"]["tool_calls"][0]["id"] != second["message"]["tool_calls"][0]["id"]
        assert first["message"]["tool_calls"][0]["function"] == second["message"]["tool_calls"][0]["function"]

    def test_reasoning_passes(self) -> None:
        _, out = relayed(chunk({"reasoning_content": "Hm"}) + output(CALL, []), [])
        assert chunks_of(out)[0]["choices"][0]["delta"]["reasoning_content"] == "Hm"

    def test_text_instead_of_a_call_is_an_error_event(self) -> None:
        reader, out = relayed(output("Paris is nice", []), [])
        assert isinstance(reader.failed, EngineError)
        assert msgspec.json.decode(out.rsplit(b"data: ", 1)[1])["error"]["code"] == "engine_error"

    def test_an_error_event_of_the_engine_is_sent_once(self) -> None:
        broken = chunk({"role": "assistant"}) + event({"error": {"code": 500, "message": "boom"}})
        reader, out = relayed(broken + chunk({"content": "{"}), [])
        assert reader.failed is not None
        assert out.count(b'"error"') == 1

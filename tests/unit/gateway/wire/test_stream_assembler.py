"""JSON bodies assembled from streams: every dialect, several choices, tool calls, and streams that end early."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llm_api_server.errors import EngineError
from llm_api_server.gateway.wire.stream_assembler import StreamAssembler
from llm_api_server.gateway.wire.stream_reader import StreamReader

USAGE = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
HEAD = {"id": "c-1", "created": 5, "model": "m", "object": "chat.completion.chunk"}


def stream(*chunks: dict[str, Any] | str) -> bytes:
    texts = [chunk if isinstance(chunk, str) else json.dumps(chunk) for chunk in chunks]
    return b"".join(f"data: {text}\n\n".encode() for text in texts)


def chat(index: int, delta: dict[str, Any], finish: str | None = None, **more: Any) -> dict[str, Any]:
    return HEAD | {"choices": [{"index": index, "delta": delta, "finish_reason": finish, **more}]}


def assembled(data: bytes, **options: Any) -> dict[str, Any]:
    reader = StreamReader("openai", show_usage=True, is_chat=True, **options)
    assembler = StreamAssembler("openai")
    for start in range(0, len(data), 13):  # reads end anywhere
        assembler.feed(reader.feed(data[start : start + 13]))
    assembler.feed(reader.flush())
    return dict(json.loads(assembler.body()))


def test_chat_chunks_become_a_completion() -> None:
    body = assembled(
        stream(
            chat(0, {"role": "assistant", "content": None}),
            chat(0, {"reasoning_content": "hm"}),
            chat(0, {"content": "He"}, logprobs={"content": [{"token": "He"}]}),
            chat(0, {"content": "llo"}, logprobs={"content": [{"token": "llo"}]}),
            chat(0, {}, "stop"),
            HEAD | {"choices": [], "usage": USAGE},
            "[DONE]",
        )
    )
    assert body == {
        "id": "c-1",
        "created": 5,
        "model": "m",
        "object": "chat.completion",
        "usage": USAGE,
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "logprobs": {"content": [{"token": "He"}, {"token": "llo"}]},
                "message": {"role": "assistant", "content": "Hello", "reasoning_content": "hm"},
            }
        ],
    }


def test_usage_of_several_choices_is_summed() -> None:
    """llama.cpp sends a usage chunk for each choice; its own JSON body has that of the first only."""
    body = assembled(
        stream(
            chat(1, {"content": "b"}),
            chat(0, {"content": "a"}),
            chat(1, {}, "length"),
            HEAD | {"choices": [], "usage": USAGE},
            chat(0, {}, "stop"),
            HEAD | {"choices": [], "usage": USAGE},
            "[DONE]",
        ),
        choices=2,
    )
    assert [choice["message"]["content"] for choice in body["choices"]] == ["a", "b"]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["stop", "length"]
    assert body["usage"]["prompt_tokens"] == 7
    assert body["usage"]["completion_tokens"] == 4
    assert body["usage"]["total_tokens"] == 11


def test_parts_of_tool_calls_are_joined() -> None:
    def call(index: int, **function: str) -> dict[str, Any]:
        start = {"id": f"call_{index}", "type": "function"} if "name" in function else {}
        return chat(0, {"tool_calls": [{"index": index, "function": function, **start}]})

    body = assembled(
        stream(
            call(0, name="f", arguments='{"a"'),
            call(0, arguments=": 1}"),
            call(1, name="g", arguments="{}"),
            chat(0, {}, "tool_calls"),
            "[DONE]",
        )
    )
    assert body["choices"][0]["message"] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_0", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
            {"id": "call_1", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        ],
    }


def test_text_chunks_become_a_completion() -> None:
    def part(index: int, text: str, finish: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
        return {"id": "c", "object": "text_completion", "choices": [choice]}

    body = assembled(stream(part(0, "a"), part(1, "x"), part(0, "b", "stop"), part(1, "", "length"), "[DONE]"))
    assert body["object"] == "text_completion"
    assert [(choice["text"], choice["finish_reason"]) for choice in body["choices"]] == [
        ("ab", "stop"),
        ("x", "length"),
    ]


def test_anthropic_events_become_a_message() -> None:
    assembler = StreamAssembler("anthropic")
    assembler.feed(
        stream(
            {"type": "message_start", "message": {"id": "m", "content": [], "usage": {"input_tokens": 3}}},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hi"}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "!"}},
            {"type": "content_block_start", "index": 1, "content_block": {"type": "tool_use", "id": "t", "input": {}}},
            {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": '{"a":'}},
            {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": "1}"}},
            {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 2}},
            {"type": "message_stop"},
        )
    )
    assert json.loads(assembler.body()) == {
        "id": "m",
        "content": [{"type": "text", "text": "Hi!"}, {"type": "tool_use", "id": "t", "input": {"a": 1}}],
        "usage": {"input_tokens": 3, "output_tokens": 2},
        "stop_reason": "end_turn",
    }


def test_the_last_responses_event_is_the_body() -> None:
    assembler = StreamAssembler("responses")
    assembler.feed(stream({"type": "response.created"}, {"type": "response.completed", "response": {"id": "r"}}))
    assert json.loads(assembler.body()) == {"id": "r"}


@pytest.mark.parametrize("dialect", ["openai", "responses", "anthropic"])
def test_a_stream_that_ends_early_is_an_error(dialect: Any) -> None:
    assembler = StreamAssembler(dialect)
    assembler.feed(stream(chat(0, {"content": "half"})))
    with pytest.raises(EngineError):
        assembler.body()

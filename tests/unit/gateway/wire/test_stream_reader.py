"""Readers of relayed responses: the usage in every dialect, and whole events wherever reads are cut."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_api_server.errors import EngineError
from llm_api_server.gateway.wire.endpoints import Dialect
from llm_api_server.gateway.wire.stream_reader import (
    BodyReader,
    StreamReader,
    error_event,
    events,
    message_start,
    waiting_comment,
)
from llm_api_server.ipc.usage_events import Usage


def event(content: Any, name: str | None = None) -> bytes:
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


def chunk(text: str, finish: str | None = None, **more: Any) -> bytes:
    return event({"id": "c", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}], **more})


USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7, "prompt_tokens_details": {"cached_tokens": 2}}
ANSWER = [chunk("a"), chunk('say "usage": {"x": 1} and "error"'), chunk("é", "stop")]
USAGE_CHUNK = event({"id": "c", "choices": [], "usage": USAGE})
DONE = b"data: [DONE]\n\n"
STREAM = b"".join([*ANSWER, USAGE_CHUNK, DONE])


def feed_in_pieces(reader: StreamReader, data: bytes, cuts: list[int]) -> bytes:
    offsets = [0, *sorted(cut % len(data) for cut in cuts), len(data)]
    out = [reader.feed(data[start:end]) for start, end in pairwise(offsets) if start < end]
    return b"".join(out) + reader.flush()


@given(cuts=st.lists(st.integers(0, 10_000), max_size=12))
def test_usage_is_hidden_wherever_reads_are_cut(cuts: list[int]) -> None:
    reader = StreamReader("openai")
    assert feed_in_pieces(reader, STREAM, cuts) == b"".join([*ANSWER, DONE])
    assert reader.usage == Usage(3, 4, 2)


@given(cuts=st.lists(st.integers(0, 10_000), max_size=12))
def test_a_stream_with_requested_usage_passes_unchanged(cuts: list[int]) -> None:
    reader = StreamReader("openai", show_usage=True)
    assert feed_in_pieces(reader, STREAM, cuts) == STREAM


KINDS = [
    chunk("a"),
    chunk("b", usage=None),
    chunk("c", "length", usage=USAGE),
    chunk("d").replace(b"\n", b"\r\n"),
    chunk('"error" [DONE] : null\n "usage": {}'),
    event({"id": "c", "choices": [{"index": 1, "delta": {"content": "e"}, "finish_reason": None}]}),
    event({"error": {"message": "boom"}}),
    USAGE_CHUNK,
    USAGE_CHUNK.replace(b"\n", b"\r\n"),
    b": a comment\n\n",
]
NULL = b"data: null\n\n"


@given(
    stream=st.lists(st.sampled_from(KINDS), min_size=1, max_size=12),
    is_done=st.booleans(),
    shows=st.booleans(),
    is_chat=st.booleans(),
    choices=st.integers(1, 2),
)
def test_events_in_one_read_are_handled_as_in_separate_reads(
    stream: list[bytes], is_done: bool, shows: bool, is_chat: bool, choices: int
) -> None:
    stream = [*([] if is_chat else [NULL]), *stream, *([DONE] if is_done else [])]
    one, other = (StreamReader("openai", show_usage=shows, is_chat=is_chat, choices=choices) for _ in range(2))
    alone = b"".join([one.feed(piece) for piece in stream]) + one.flush()
    together = other.feed(b"".join(stream)) + other.flush()
    assert together == alone
    assert other.usage == one.usage


@given(
    stream=st.lists(st.lists(st.sampled_from([*KINDS, DONE, NULL]), min_size=1, max_size=4), min_size=1, max_size=6),
    cut=st.integers(0, 200),
    is_chat=st.booleans(),
)
def test_chunks_pass_only_if_feed_would_not_change_them(stream: list[list[bytes]], cut: int, is_chat: bool) -> None:
    one, other = StreamReader("openai", is_chat=is_chat), StreamReader("openai", is_chat=is_chat)
    for number, payload in enumerate(map(b"".join, stream)):
        data = payload[:cut] if number == len(stream) // 2 else payload
        expected = one.feed(data)
        if other.passes(b"%x\r\n%b\r\n" % (len(data), data)):
            assert expected == data
        else:
            assert other.feed(data) == expected
        assert other.usage == one.usage
        if one.failed is not None:
            return


def test_plain_chunks_pass_and_their_tokens_count() -> None:
    reader = StreamReader("openai", is_chat=True)
    reader.feed(event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}))
    assert reader.passes(b"%x\r\n%b\r\n" % (len(ANSWER[0]), ANSWER[0]))
    assert reader.usage_so_far.completion_tokens == 1


@given(cuts=st.lists(st.integers(0, 10_000), max_size=12))
def test_an_error_event_is_translated_and_ends_the_stream(cuts: list[int]) -> None:
    broken = ANSWER[0] + event({"error": {"code": 500, "message": "boom", "type": "server_error"}}) + DONE
    reader = StreamReader("openai")
    out = feed_in_pieces(reader, broken, cuts)
    assert out.startswith(ANSWER[0])
    assert json.loads(out[len(ANSWER[0]) :].removeprefix(b"data: "))["error"] == {
        "message": "boom",
        "type": "server_error",
        "param": None,
        "code": "engine_error",
    }
    assert isinstance(reader.failed, EngineError)


def test_a_plain_read_is_returned_without_a_copy() -> None:
    assert StreamReader("openai").feed(ANSWER[0]) is ANSWER[0]


def test_carriage_returns_are_line_ends_too() -> None:
    reader = StreamReader("openai")
    stream = STREAM.replace(b"\n", b"\r\n")
    assert feed_in_pieces(reader, stream, [7, 130]) == b"".join([*ANSWER, DONE]).replace(b"\n", b"\r\n")


def test_usage_in_the_last_chunk_of_each_choice_becomes_one_usage_chunk() -> None:
    """llama.cpp reports so; here with two choices."""
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    stream = chunk("a") + chunk("", "stop", usage=usage) + chunk("", "stop", usage=usage)
    reader = StreamReader("openai", show_usage=True, choices=2)
    assert reader.feed(stream) == stream
    added = json.loads(reader.feed(DONE).split(b"\n\n")[0].removeprefix(b"data: "))
    assert added["choices"] == []
    assert added["usage"]["prompt_tokens"] == 3
    assert added["usage"]["completion_tokens"] == 8
    assert added["usage"]["total_tokens"] == 11


def test_a_null_event_is_dropped() -> None:
    assert StreamReader("openai").feed(b"data: null\n\n" + ANSWER[0]) == ANSWER[0]


def test_the_two_usage_parts_of_an_anthropic_stream_are_merged() -> None:
    start = {"type": "message_start", "message": {"usage": {"input_tokens": 1, "cache_read_input_tokens": 30}}}
    end = {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 9}}
    reader = StreamReader("anthropic")
    stream = event(start, "message_start") + event(end, "message_delta")
    assert reader.feed(stream) == stream
    assert reader.usage == Usage(31, 9, 30)


@pytest.mark.parametrize("cuts", [[], [5, 60], [100]])
def test_an_anthropic_stream_without_a_start_gets_one(cuts: list[int]) -> None:
    """llama.cpp omits the start if the first token is not a whole character."""
    block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    end = {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 9}}
    stop = {"type": "message_stop"}
    stream = (
        b": ping\n\n" + event(block, "content_block_start") + event(end, "message_delta") + event(stop, "message_stop")
    )
    reader = StreamReader("anthropic", opening=message_start("msg_1", "smol", 12))
    first, *rest = events(feed_in_pieces(reader, stream, cuts))
    assert json.loads(first)["message"]["id"] == "msg_1"
    assert [json.loads(payload) for payload in rest] == [block, end, stop]
    assert reader.usage == Usage(12, 9)


def test_an_anthropic_stream_keeps_its_own_start() -> None:
    start = event({"type": "message_start", "message": {"usage": {"input_tokens": 1}}}, "message_start")
    assert StreamReader("anthropic", opening=message_start("msg_1", "smol", 12)).feed(start) == start


def test_an_error_before_the_start_is_the_only_event() -> None:
    reader = StreamReader("anthropic", opening=message_start("msg_1", "smol", 12))
    out = reader.feed(event({"error": {"code": 400, "message": "no"}}))
    assert reader.failed is not None
    assert out == error_event("anthropic", reader.failed)


def test_usage_is_read_from_the_last_event_of_a_responses_stream() -> None:
    usage = {"input_tokens": 5, "output_tokens": 6, "total_tokens": 11, "input_tokens_details": {"cached_tokens": 1}}
    reader = StreamReader("responses")
    reader.feed(
        event({"type": "response.completed", "response": {"error": None, "usage": usage}}, "response.completed")
    )
    assert reader.usage == Usage(5, 6, 1)


@pytest.mark.parametrize(
    "junk", [b'data: {broken "usage"\n\n', b': "error" comment\n\n', b'data: ["usage"]\n\n', b"\n\n"]
)
def test_an_unreadable_event_passes_unchanged(junk: bytes) -> None:
    assert StreamReader("openai").feed(junk) == junk


@given(cut=st.integers(0, 400), padding=st.integers(0, 3000))
def test_usage_in_a_json_body_is_found_anywhere(cut: int, padding: int) -> None:
    text = "x" * padding + '"usage": {"prompt_tokens": 99}'
    body = json.dumps({"choices": [{"text": text}], "usage": USAGE, "more": "y" * padding}).encode()
    reader = BodyReader()
    reader.feed(body[:cut])
    reader.feed(body[cut:])
    assert reader.usage == Usage(3, 4, 2)


def test_the_first_chunk_of_each_choice_gets_the_role() -> None:
    """llama.cpp omits it if the first token is not a whole character."""
    reader = StreamReader("openai", is_chat=True, choices=2)
    chunks = [(0, {"content": "自"}), (0, {"content": "己"}), (1, {"role": "assistant", "content": None}), (1, {})]
    seen = b"".join(
        reader.feed(event({"id": "x", "choices": [{"index": index, "delta": delta}]})) for index, delta in chunks
    )
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in seen.splitlines() if line]
    assert deltas == [
        {"role": "assistant", "content": "自"},
        {"content": "己"},
        {"role": "assistant", "content": None},
        {},
    ]


def test_embeddings_count_as_prompt_tokens() -> None:
    reader = BodyReader()
    reader.feed(b'{"data":[],"usage":{"prompt_tokens":0,"total_tokens":6}}')
    assert reader.usage == Usage(6, 0, 0)


def test_each_dialect_has_its_own_error_event() -> None:
    error = EngineError("boom")
    assert error_event("anthropic", error).startswith(b"event: error\ndata: ")
    assert json.loads(error_event("responses", error).split(b"data: ")[1])["type"] == "error"
    assert json.loads(error_event("openai", error).removeprefix(b"data: "))["error"]["code"] == "engine_error"


def test_a_model_name_cannot_add_lines_to_a_comment() -> None:
    assert waiting_comment("a\n\ndata: x", None) == b": waiting for a??data: x\n"


def test_a_comment_has_the_position_in_the_queue() -> None:
    assert waiting_comment("m", 7) == b": waiting for m, position 7\n"


def chunks(*texts: str, end: str = "\n\n") -> list[bytes]:
    return [f'data: {{"choices":[{{"index":0,"delta":{{"content":"{text}"}}}}]}}{end}'.encode() for text in texts]


@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n"])
@pytest.mark.parametrize("joined", [False, True])
def test_tokens_are_counted_until_the_engine_reports_usage(end: str, joined: bool) -> None:
    reader = StreamReader("openai", is_chat=True)
    data = [b'data: {"choices":[{"index":0,"delta":{"role":"assistant"}}]}' + end.encode(), *chunks("a", "b", end=end)]
    for read in [b"".join(data)] if joined else data:
        reader.feed(read)
    assert reader.usage_so_far == Usage(0, 2)
    reader.cut_off()
    assert reader.usage_so_far == Usage(0, 3)
    reader.feed(b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":7}}' + end.encode())
    assert reader.usage_so_far == Usage(5, 7)


def test_a_stream_cut_off_before_its_first_token_has_none() -> None:
    reader = StreamReader("openai", is_chat=True)
    reader.feed(b'data: {"choices":[{"index":0,"delta":{"role":"assistant"}}]}\n\n')
    reader.cut_off()
    assert reader.usage_so_far == Usage()


@pytest.mark.parametrize(
    ("dialect", "event"),
    [
        ("anthropic", b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"text":"a"}}\n\n'),
        ("responses", b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta"}\n\n'),
    ],
)
def test_only_events_with_tokens_are_counted(dialect: Dialect, event: bytes) -> None:
    reader = StreamReader(dialect)
    reader.feed(b'event: start\ndata: {"type":"start"}\n\n' + event * 3 + b'event: stop\ndata: {"type":"stop"}\n\n')
    assert reader.usage_so_far == Usage(0, 3)

"""Streams of remotes: any framing and any cut give the same events; wrong members hide no others; an end is needed."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_api_server.gateway.wire.endpoints import Dialect
from llm_api_server.gateway.wire.remote_stream import RemoteStreamReader
from llm_api_server.gateway.wire.stream_reader import StreamReader, events, message_start
from llm_api_server.ipc.usage_events import Usage


def chunk(text: str, finish: str | None = None, **more: Any) -> dict[str, Any]:
    delta = {"role": "assistant", "content": text}
    return {"id": "c", "created": 1, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more}


COUNTS = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
USAGE = {"id": "c", "choices": [], "usage": COUNTS}
ANSWER = [chunk("a"), chunk('\r "usage" \n\n data: é'), chunk("c", "stop")]
MESSAGE = [
    {"type": "message_start", "message": {"usage": {"input_tokens": 5}}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "a"}},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 6}},
    {"type": "message_stop"},
]
RESPONSE = [
    {"type": "response.created", "sequence_number": 0, "response": {"usage": None}},
    {"type": "response.output_text.delta", "sequence_number": 1, "delta": "a"},
    {
        "type": "response.completed",
        "sequence_number": 2,
        "response": {"usage": {"input_tokens": 5, "output_tokens": 6}},
    },
]


def fed(reader: StreamReader, data: bytes, cuts: list[int]) -> bytes:
    offsets = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return b"".join([reader.feed(data[start:end]) for start, end in pairwise(offsets)]) + reader.flush()


def payloads(data: bytes) -> list[Any]:
    return [payload if payload == b"[DONE]" else json.loads(payload) for payload in events(data)]


def framed(
    contents: list[Any], end: str, parting: int, noise: str, *, bom: bool, is_ended: bool, pretty: bool
) -> bytes:
    """Return a stream with these line ends, that many of them between two events, and other lines before each."""
    text = "\ufeff" if bom else ""
    for content in contents:
        body = content if isinstance(content, str) else json.dumps(content, indent=1 if pretty else None)
        text += "".join(f"{line}{end}" for line in noise.splitlines())
        text += "".join(f"data: {line}{end}" for line in body.splitlines()) + end * (parting - 1)
    return (text if is_ended else text.rstrip("\r\n")).encode()


FRAMINGS = st.fixed_dictionaries(
    {
        "end": st.sampled_from(["\n", "\r\n", "\r"]),
        "parting": st.integers(1, 3),
        "noise": st.sampled_from(["", ": ping", "id: 7\nretry: 10", ": a\n: b\nevent: message"]),
        "bom": st.booleans(),
        "is_ended": st.booleans(),
        "pretty": st.booleans(),
    }
)
CUTS = st.lists(st.integers(0, 10_000), max_size=12)


@given(framing=FRAMINGS, cuts=CUTS, shows=st.booleans(), is_done=st.booleans())
def test_a_chat_in_any_framing_and_cut_gives_the_same_events(
    framing: dict[str, Any], cuts: list[int], shows: bool, is_done: bool
) -> None:
    reader = RemoteStreamReader("openai", show_usage=shows, is_chat=True)
    out = fed(reader, framed([*ANSWER, USAGE, *(["[DONE]"] if is_done else [])], **framing), cuts)
    usage, done = [USAGE] if shows else [], [b"[DONE]"] if is_done else []
    assert payloads(out) == [*ANSWER, *usage, *done]
    assert reader.usage == Usage(3, 4)
    assert reader.failed is None
    assert all(line.startswith(b"data: ") or line in (b"", b":") for line in out.split(b"\n"))


@given(framing=FRAMINGS, cuts=CUTS)
@pytest.mark.parametrize(("dialect", "contents"), [("anthropic", MESSAGE), ("responses", RESPONSE)])
def test_other_dialects_in_any_framing_keep_their_events_and_get_their_names(
    dialect: Dialect, contents: list[Any], framing: dict[str, Any], cuts: list[int]
) -> None:
    framing["noise"] = framing["noise"].replace("\nevent: message", "")
    reader = RemoteStreamReader(dialect)
    out = fed(reader, framed(contents, **framing), cuts)
    assert payloads(out) == contents
    names = [line.removeprefix(b"event: ").decode() for line in out.split(b"\n") if line.startswith(b"event: ")]
    assert names == [content["type"] for content in contents]
    assert reader.usage == Usage(5, 6)
    assert reader.failed is None


@given(count=st.integers(0, 2), framing=FRAMINGS, cuts=CUTS)
def test_a_stream_that_ends_early_fails(count: int, framing: dict[str, Any], cuts: list[int]) -> None:
    for dialect, contents in (("openai", ANSWER), ("anthropic", MESSAGE), ("responses", RESPONSE)):
        reader = RemoteStreamReader(dialect)  # type: ignore[arg-type]
        found = payloads(fed(reader, framed(contents[:count], **framing), cuts))
        assert found[:-1] == contents[:count]
        assert "error" in found[-1] or found[-1]["type"] == "error"
        assert reader.failed is not None
        assert (reader.failed.status, reader.failed.code) == (502, "engine_error")


@pytest.mark.parametrize(
    "data", [b"", b"data: [DONE]\n\n", b": ping\n\n", b"data: [DONE]", b"\xef\xbb\xbf\r\r", b"<html>"]
)
def test_a_stream_without_a_chunk_fails(data: bytes) -> None:
    reader = RemoteStreamReader("openai", show_usage=True, is_chat=True)
    assert "error" in payloads(fed(reader, data, []))[0]
    assert reader.failed is not None


@pytest.mark.parametrize("dialect", ["openai", "anthropic", "responses"])
def test_an_engines_stream_that_ends_early_fails_as_well(dialect: Dialect) -> None:
    reader = StreamReader(dialect)
    out = reader.feed(b'data: {"choices":[]}\n\n') + reader.flush()
    assert reader.failed is not None
    assert payloads(out)[-1] != {"choices": []}


def test_an_engines_last_events_without_an_empty_line_are_read() -> None:
    reader = StreamReader("openai")
    data = b"".join(b"data: " + json.dumps(one).encode() + b"\n\n" for one in [*ANSWER, USAGE]) + b"data: [DONE]"
    assert payloads(fed(reader, data, [5, 200])) == [*ANSWER, b"[DONE]"]
    assert (reader.failed, reader.usage) == (None, Usage(3, 4))


@pytest.mark.parametrize(
    "members",
    [{"created": 1.5}, {"id": 7}, {"model": 5}, {"object": []}, {"error": ""}, {"error": False}, {"error": {}},
     {"choices": [{"index": None, "delta": {"content": "x"}, "finish_reason": None}]},
     {"choices": [{"index": "0", "delta": None}]}, {"usage": "none"}, {"usage": []}, {"message": 3}, {"type": 1}],
)  # fmt: skip
def test_a_wrong_member_hides_no_other(members: dict[str, Any]) -> None:
    contents = [{**content, **members} for content in (chunk("a"), chunk("b"))]
    for reader in (RemoteStreamReader("openai", is_chat=True), StreamReader("openai", is_chat=True)):
        data = b"".join(b"data: " + json.dumps(one).encode() + b"\n\n" for one in [*contents, chunk("", "stop"), USAGE])
        found = payloads(fed(reader, data + b"data: [DONE]\n\n", [40]))
        assert len(found) == 4  # the usage chunk was not asked for
        assert found[-1] == b"[DONE]"
        assert found[0]["choices"][0]["delta"]["role"] == "assistant"
        assert (reader.failed, reader.usage) == (None, Usage(3, 4))


@pytest.mark.parametrize(
    "usage",
    [{"prompt_tokens": "3", "completion_tokens": "4"}, {"prompt_tokens": 3.0, "completion_tokens": 4.0},
     {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": None},
     {"prompt_tokens": "3.0", "completion_tokens": 4, "prompt_tokens_details": "none"}],
)  # fmt: skip
def test_counts_of_any_type_are_read_and_shown_as_integers(usage: dict[str, Any]) -> None:
    data = b"".join(
        b"data: " + json.dumps(one).encode() + b"\n\n" for one in [*ANSWER, {"choices": [], "usage": usage}]
    )
    hidden, shown = RemoteStreamReader("openai"), RemoteStreamReader("openai", show_usage=True)
    assert payloads(fed(hidden, data, [])) == ANSWER
    assert payloads(fed(shown, data, []))[-1]["usage"].items() >= COUNTS.items()
    assert (hidden.usage, shown.usage) == (Usage(3, 4), Usage(3, 4))


@pytest.mark.parametrize("count", [-5, "many", "inf", "nan", 1e300, [], {}, 10**30])
def test_a_count_that_is_none_is_not_believed(count: Any) -> None:
    data = json.dumps({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": count}}).encode()
    reader = RemoteStreamReader("openai")
    reader.feed(b"data: " + data + b"\n\n")
    assert reader.usage == Usage(3, 0)


@pytest.mark.parametrize("junk", [b"{broken", b"[1, 2]", b"7", b'"text"', b'{"choices":[5]}', b'{"choices":{}}',
                                  b'{"choices":[{"delta":"x"}]}'])  # fmt: skip
def test_a_malformed_event_is_an_engine_error(junk: bytes) -> None:
    reader = RemoteStreamReader("openai")
    good = b"data: " + json.dumps(ANSWER[0]).encode() + b"\n\n"
    out = reader.feed(good + b"data: " + junk + b"\n\n" + good)
    assert out.startswith(good)
    assert junk not in out
    assert payloads(out)[1]["error"]["code"] == "engine_error"


@pytest.mark.parametrize(
    "event",
    [b'event: error\ndata: {"message":"boom"}\n\n', b'data: {"error":{"message":"boom"}}', b'data: {"error":"boom"}\n',
     b'error: {"message":"boom"}\n\n', b'data: [{"error":{"code":500,"message":"boom"}}]\r\n\r\n',
     b'{"error":{"message":"boom"}}', b"event: error\ndata: boom\n\n", b'data: {"type":"error","message":"boom"}\n\n'],
)  # fmt: skip
@pytest.mark.parametrize("dialect", ["openai", "anthropic", "responses"])
def test_an_error_of_any_form_ends_the_stream_in_the_clients_form(dialect: Dialect, event: bytes) -> None:
    reader = RemoteStreamReader(dialect)
    out = fed(reader, event, [9])
    assert reader.failed is not None
    assert reader.failed.message == "boom"
    error = payloads(out)[-1]
    assert (error if dialect == "responses" else error["error"])["message"] == "boom"


def test_the_error_event_of_responses_has_the_next_number() -> None:
    reader = RemoteStreamReader("responses")
    data = b"".join(b"data: " + json.dumps(one).encode() + b"\n\n" for one in RESPONSE[:2])
    assert payloads(fed(reader, data, []))[-1]["sequence_number"] == 2


def test_comments_are_kept_within_a_stream_only_and_without_their_empty_line() -> None:
    reader = RemoteStreamReader("openai")
    good = b"data: " + json.dumps(ANSWER[0]).encode() + b"\n\n"
    assert reader.feed(b": wait\n\n" + good) == good
    assert reader.feed(b": still here\n\n") == b":\n"


def test_a_type_cannot_add_lines() -> None:
    reader = RemoteStreamReader("anthropic")
    out = reader.feed(b'data: {"type":"a\\n\\ndata: x"}\n\n')
    assert out == b'data: {"type":"a\\n\\ndata: x"}\n\n'


def test_a_message_without_its_start_gets_one() -> None:
    reader = RemoteStreamReader("anthropic", opening=message_start("msg_1", "smol", 12))
    data = b"".join(b"data: " + json.dumps(one).encode() + b"\n\n" for one in MESSAGE[1:])
    assert [one["type"] for one in payloads(fed(reader, data, [3, 80]))][:2] == ["message_start", "content_block_delta"]


@given(
    stream=st.lists(
        st.sampled_from([*ANSWER, USAGE, chunk("x", created=1.5), {"error": {"message": "no"}}, {"choices": [5]}]),
        min_size=1,
        max_size=6,
    ),
    end=st.sampled_from(["\n\n", "\r\n\r\n", "\n"]),
)
def test_chunks_pass_only_if_feed_would_not_change_them(stream: list[Any], end: str) -> None:
    one, other = (RemoteStreamReader("openai", is_chat=True) for _ in range(2))
    for content in stream:
        data = f"data: {json.dumps(content)}{end}".encode()
        expected = one.feed(data)
        if other.passes(b"%x\r\n%b\r\n" % (len(data), data)):
            assert expected == data
        else:
            assert other.feed(data) == expected
        assert (other.usage, other.is_complete) == (one.usage, one.is_complete)
        assert other.usage_so_far == one.usage_so_far
        if one.failed is not None:
            return


def test_usual_chunks_pass_unread_by_the_framing() -> None:
    reader = RemoteStreamReader("openai", is_chat=True)
    data = b"data: " + json.dumps(ANSWER[0]).encode() + b"\n\n"
    reader.feed(data)
    assert reader.passes(b"%x\r\n%b\r\n" % (len(data), data))

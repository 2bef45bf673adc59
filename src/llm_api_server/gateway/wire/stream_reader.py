"""Readers of relayed responses: usage, the end of a stream, errors inside it. Pure.

Most reads cost a few substring searches: an event is parsed only if it may carry one of the three.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec

from llm_api_server.errors import ApiError, BadEngineResponse, anthropic_error_body, render
from llm_api_server.gateway.wire.endpoints import Dialect
from llm_api_server.gateway.wire.engine_errors import error_status, translate_error
from llm_api_server.ipc.usage_events import NO_USAGE, Usage

MAX_EVENT_BYTES = 16 * 1024 * 1024
#: Bytes of a body that are kept, so that `usage` is found across two reads.
_OVERLAP_BYTES = 1024
_EVENT_END = re.compile(rb"\r?\n\r?\n")
#: Marks of events that must be parsed. Generated text cannot contain them: JSON escapes its quotes.
_USAGE_MARK = b'"usage"'
_DONE_EVENT = b"data: [DONE]\n\n"
_ERROR_MARK, _NULL_MARK = b'"error"', b": null\n"
#: Marks of the last event; that of a Responses stream has a usage.
_DONE_MARKS: dict[Dialect, bytes] = {"openai": b"[DONE]", "responses": b"[DONE]", "anthropic": b"message_stop"}
#: Bytes at the end of a read that are searched for the last event; searching all of them takes longer.
_LAST_BYTES = 128
#: Message of an error that ends a response before its end.
CUT_OFF = "The engine stopped in the middle of its response."
_START_MARK = b'"message_start"'
#: Mark of the first event of a chat: with one choice, no other event needs the role.
_ROLE_MARK = b'"delta":{"role":"'
_NO_USAGE = (b":null", b": null")
#: Mark of an event with a token; in OpenAI's streams nearly every event has one. Single bytes are slower to count.
_TOKEN_MARKS: dict[Dialect, bytes] = {
    "openai": b"\n\n",
    "responses": b".delta\ndata:",
    "anthropic": b"event: content_block_delta",
}


class _Choice(msgspec.Struct):
    index: Any = 0
    finish_reason: Any = None
    delta: dict[str, Any] | None = None


class StreamEvent(msgspec.Struct):
    """Members of an event that are read. Engines are not trusted with types: a wrong one hides no other member."""

    type: Any = None
    id: Any = None
    object: Any = None
    created: Any = None
    model: Any = None
    choices: list[_Choice] | None = None
    usage: Any = None
    message: Any = None
    response: Any = None
    error: Any = None
    sequence_number: Any = None


EVENT = msgspec.json.Decoder(StreamEvent)
#: Types of the events that end a stream.
_LAST_TYPES = frozenset(
    {"message_stop", "response.completed", "response.incomplete", "response.failed", "transcript.text.done"}
)
#: Largest token count that is believed.
_MAX_TOKENS = 2**31 - 1


class StreamReader:
    """Reader and filter of one event stream while it is relayed.

    `feed` returns whole events only, so that a hidden or translated event never shows in part. After `failed` is set,
    the stream is over. A stream that ends without its last event has failed. With `show_usage` the client gets exactly
    one OpenAI usage chunk, at the end, even if the engine sends one per choice or puts the usage into other chunks;
    without it, none. With `is_chat` the first chunk of each choice gets the role, which llama.cpp omits if the first
    token is not a whole character. For the same reason its Anthropic streams may lack `message_start`; then `opening`
    begins the stream.
    """

    def __init__(
        self,
        dialect: Dialect,
        *,
        show_usage: bool = False,
        is_chat: bool = False,
        choices: int = 1,
        opening: bytes = b"",
    ) -> None:
        self._dialect = dialect
        self._opening = opening
        self._show_usage = show_usage
        self._choices = choices
        self._without_role = set(range(choices)) if is_chat else set()
        self._is_chat = is_chat
        self._token_mark, self._events_without_tokens = _TOKEN_MARKS[dialect], choices if is_chat else 0
        self._done_mark = _DONE_MARKS[dialect]
        self._token_events = 0
        self._tail = b""
        self._last_chunk: StreamEvent | None = None
        self._prompt_tokens_of_choices = 0
        self._usage_chunks: list[bytes] = []
        self.usage: Usage | None = None
        self.failed: ApiError | None = None
        #: Whether the event that ends a stream has been read.
        self.is_complete = False
        #: Number that the next event of a Responses stream would have, if its events have numbers.
        self.next_sequence_number = 0

    def feed(self, data: bytes) -> bytes:
        """Return the bytes to send now, perhaps none."""
        if self.failed is not None:
            return b""
        if self._tail:
            data = self._tail + data
            self._tail = b""
        if not data.endswith((b"\n\n", b"\n\r\n")):
            data = self._keep_tail(data)
        if self._opening and data.find(b"data:") >= 0:
            data = self._with_opening(data)
        self._token_events += data.count(self._token_mark) or (
            data.count(b"\n\r\n") if self._dialect == "openai" else 0
        )
        if self._without_role and self._choices == 1:
            end = data.find(b"\n\n")
            if data.find(_ROLE_MARK, 0, end) >= 0:
                self._without_role.clear()
        # `in` is slower: it first tries the bytes as a number, at the price of an exception.
        is_plain = (
            not self._without_role
            and data.find(_USAGE_MARK) < 0
            and data.find(_ERROR_MARK) < 0
            and data.find(self._done_mark, -_LAST_BYTES) < 0
            and (self._is_chat or data.find(_NULL_MARK) < 0)
        )
        return data if is_plain else self._filter(data)

    def passes(self, chunks: bytes) -> bool:
        """Return whether HTTP chunks with whole events can be relayed unread; if not, `feed` must get their events."""
        if (
            self._tail
            or self._without_role
            or self._opening
            or not chunks.endswith(b"\n\n\r\n")
            or chunks.find(_USAGE_MARK) >= 0
            or chunks.find(_ERROR_MARK) >= 0
            or chunks.find(self._done_mark, -_LAST_BYTES) >= 0
            or not (self._is_chat or chunks.find(_NULL_MARK) < 0)
        ):
            return False
        self._token_events += chunks.count(self._token_mark)
        return True

    @property
    def usage_so_far(self) -> Usage:
        """Usage as the engine reported it; before its report, the number of events with a token."""
        if self.usage is not None and self.usage.completion_tokens:
            return self.usage
        return msgspec.structs.replace(self.usage or NO_USAGE, completion_tokens=self._tokens())

    def cut_off(self) -> None:
        """Count the token of each choice that llama.cpp generates before it notices the closed connection."""
        if self._tokens() > 0:
            self._token_events += self._choices

    def _tokens(self) -> int:
        return max(0, self._token_events - self._events_without_tokens)

    def flush(self) -> bytes:
        """Return the rest of a stream that is over: the last event, if it lacks its empty line, and usage or error."""
        return self._ended(self._rest())

    def _rest(self) -> bytes:
        """Read the last event of a stream that ends without an empty line, unless it is cut off."""
        tail, self._tail = self._tail.strip(), b""
        return self.feed(tail + b"\n\n") if tail and _is_whole(_payload(tail)) else b""

    def _ended(self, rest: bytes) -> bytes:
        if self.failed is not None:
            return rest
        if self.is_complete:
            return rest + self._usage_chunk()
        self.failed = BadEngineResponse(CUT_OFF)
        return rest + error_event(self._dialect, self.failed, self.next_sequence_number)

    def _with_opening(self, data: bytes) -> bytes:
        opening, self._opening = self._opening, b""
        return data if _START_MARK in data or _ERROR_MARK in data else opening + data

    def _keep_tail(self, data: bytes) -> bytes:
        end = max(data.rfind(b"\n\n") + 2, data.rfind(b"\n\r\n") + 3, 0)
        end = end if end > 2 else 0  # noqa: PLR2004 - rfind's -1 plus the length of the mark: not found
        self._tail = data[end:]
        if len(self._tail) > MAX_EVENT_BYTES:
            self._tail = b""
            self.failed = BadEngineResponse("The engine sent an event that is too long.")
        return data[:end]

    def _filter(self, data: bytes) -> bytes:
        """Read the first event of each choice and all events with a mark; pass the others."""
        out: list[bytes] = []
        start = end = 0
        while end < len(data):
            copied = end
            if self._without_role:
                start, end = end, _event_end(data, end)
            elif len(data) - end == len(_DONE_EVENT) and data.endswith(_DONE_EVENT):
                start, end = end, len(data)
            elif (mark_at := self._next_mark(data, end)) >= 0:
                start, end = _event_start(data, end, mark_at), _event_end(data, mark_at)
            else:
                out.append(data[end:])
                break
            out += data[copied:start], self._read_event(data[start:end])
            if self.failed is not None:
                break
        return b"".join(out)

    def _next_mark(self, data: bytes, start: int) -> int:
        """Return the offset of the next mark, or -1."""
        nearest = data.find(_USAGE_MARK, start)
        while nearest >= 0 and data.startswith(_NO_USAGE, nearest + len(_USAGE_MARK)):
            nearest = data.find(_USAGE_MARK, nearest + 1)  # some engines send a null usage in every event
        others = [(_ERROR_MARK, start), (self._done_mark, max(start, len(data) - _LAST_BYTES))]
        if not self._is_chat:
            others.append((_NULL_MARK, start))
        for mark, first in others:
            found = data.find(mark, first, nearest if nearest >= 0 else len(data))
            nearest = found if found >= 0 else nearest
        return nearest

    def _read_event(self, event: bytes) -> bytes:
        payload = b"[DONE]" if event == _DONE_EVENT else _payload(event)
        if payload == b"[DONE]":
            self.is_complete = True
            return self._usage_chunk() + event
        if payload == b"null":  # llama.cpp's first event for several prompts; SDKs crash on it
            return b""
        try:
            content = EVENT.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return event
        return self._read_content(content, payload, event)

    def _read_content(self, content: StreamEvent, payload: bytes, event: bytes) -> bytes:
        if content.error or content.type == "error":
            return self._fail(translate_error(error_status(content.error) or 500, payload))
        if _is_last(content):
            self.is_complete = True
        if self._without_role and content.choices:
            event = self._with_role(content.choices, payload, event)
        return self._read_usage(content, event)

    def _fail(self, error: ApiError) -> bytes:
        self.failed = error
        return error_event(self._dialect, error, self.next_sequence_number)

    def _with_role(self, choices: list[_Choice], payload: bytes, event: bytes) -> bytes:
        first = {index_of(choice.index) for choice in choices} & self._without_role
        if not first:
            return event
        self._without_role -= first
        if all(_has_role(choice.delta) for choice in choices if index_of(choice.index) in first):
            return event
        chunk = msgspec.json.decode(payload, type=dict[str, Any])
        for choice in chunk["choices"]:
            if index_of(choice.get("index")) in first:
                choice["delta"] = {"role": "assistant", **(choice.get("delta") or {})}
        return b"data: " + msgspec.json.encode(chunk) + b"\n\n"

    def _read_usage(self, content: StreamEvent, event: bytes) -> bytes:
        if content.choices is not None:
            self._last_chunk = content
        if isinstance(content.message, dict):
            self._merge_usage(content.message.get("usage"))
        if isinstance(content.response, dict):
            self._merge_usage(content.response.get("usage"))
        if not isinstance(content.usage, dict):
            return b"" if content.usage is not None and content.choices == [] else event
        if content.choices == []:
            self._add_usage_chunk(content.usage, event)
            return b""
        if content.choices is None:
            self._merge_usage(content.usage)
        elif any(choice.finish_reason for choice in content.choices):
            self._add_choice_usage(content.usage)
        return event

    def _merge_usage(self, reported: Any) -> None:
        """Complete the usage: Anthropic's streams report the prompt first and the output last."""
        if not isinstance(reported, dict):
            return
        now = _usage(reported)
        before = self.usage or Usage()
        self.usage = Usage(
            prompt_tokens=now.prompt_tokens or before.prompt_tokens,
            completion_tokens=now.completion_tokens or before.completion_tokens,
            cached_tokens=now.cached_tokens or before.cached_tokens,
            reasoning_tokens=now.reasoning_tokens or before.reasoning_tokens,
        )

    def _add_choice_usage(self, reported: dict[str, Any]) -> None:
        """Add the usage of one choice, which llama.cpp's text completions report in the choice's last chunk."""
        now = _usage(reported)
        before = self.usage or Usage()
        self._prompt_tokens_of_choices += now.prompt_tokens
        self.usage = Usage(
            prompt_tokens=self._prompt_tokens_of_choices // self._choices or now.prompt_tokens,
            completion_tokens=before.completion_tokens + now.completion_tokens,
            cached_tokens=before.cached_tokens + now.cached_tokens,
            reasoning_tokens=before.reasoning_tokens + now.reasoning_tokens,
        )

    def _add_usage_chunk(self, reported: dict[str, Any], event: bytes) -> None:
        """Add a usage chunk; llama.cpp sends one for each choice, all with the same prompt."""
        now = _usage(reported)
        before = self.usage if self._usage_chunks and self.usage is not None else Usage()
        self._usage_chunks.append(event if _is_exact(reported) else b"")
        self.usage = Usage(
            prompt_tokens=max(now.prompt_tokens, before.prompt_tokens),
            completion_tokens=now.completion_tokens + before.completion_tokens,
            cached_tokens=max(now.cached_tokens, before.cached_tokens),
            reasoning_tokens=now.reasoning_tokens + before.reasoning_tokens,
        )

    def _usage_chunk(self) -> bytes:
        """Return the usage chunk for the client, or nothing; the engine's own if it sent exactly one, of integers."""
        held, self._usage_chunks = self._usage_chunks, []
        if not self._show_usage or self.usage is None or self._last_chunk is None:
            return b""
        self._show_usage = False
        if len(held) == 1 and held[0]:
            return held[0]
        head = self._last_chunk
        chunk: dict[str, Any] = {
            "id": head.id,
            "object": head.object,
            "created": head.created,
            "model": head.model,
            "choices": [],
            "usage": {
                "prompt_tokens": self.usage.prompt_tokens,
                "completion_tokens": self.usage.completion_tokens,
                "total_tokens": self.usage.prompt_tokens + self.usage.completion_tokens,
                "prompt_tokens_details": {"cached_tokens": self.usage.cached_tokens},
            },
        }
        return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


class BodyReader:
    """Reader of `usage` in a JSON body that is relayed in pieces."""

    def __init__(self) -> None:
        self._tail = b""
        self.usage: Usage | None = None

    def feed(self, data: bytes) -> bytes:
        """Return `data` unchanged."""
        window = self._tail + data if self._tail else data
        mark_at = window.rfind(_USAGE_MARK)  # engines put it last
        if mark_at >= 0 and (found := _object_after(window, mark_at)) is not None:
            self.usage = _decode_usage(found) or self.usage
        self._tail = window[-_OVERLAP_BYTES:]
        return data


def events(data: bytes) -> Iterator[bytes]:
    """Yield the payloads of the whole events in `data`."""
    for event in _EVENT_END.split(data):
        if payload := _payload(event):
            yield payload


def message_start(message_id: str, model: str, prompt_tokens: int) -> bytes:
    """Return the first event of an Anthropic stream."""
    message: dict[str, Any] = {
        "id": message_id,
        "type": "message",
        "role": "assistant",
        "content": [],
        "model": model,
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"cache_read_input_tokens": 0, "input_tokens": prompt_tokens, "output_tokens": 0},
    }
    event = {"type": "message_start", "message": message}
    return b"event: message_start\ndata: " + msgspec.json.encode(event) + b"\n\n"


def error_event(dialect: Dialect, error: ApiError, sequence_number: int = 0) -> bytes:
    """Return the event that ends a stream which failed after its first byte; Responses number their events."""
    if dialect == "anthropic":
        return b"event: error\ndata: " + anthropic_error_body(error.status, error.message) + b"\n\n"
    if dialect == "responses":
        event = {
            "type": "error",
            "code": error.code or error.type,
            "message": error.message,
            "param": error.param,
            "sequence_number": sequence_number,
        }
        return b"event: error\ndata: " + msgspec.json.encode(event) + b"\n\n"
    return b"data: " + render(error) + b"\n\n"


def waiting_comment(model: str, position: int | None) -> bytes:
    """Return an SSE comment, which clients skip and which keeps proxies from closing a silent connection.

    It is a line of the event that follows: a blank line of its own would be an empty event to some clients.
    """
    name = "".join(char if char.isprintable() else "?" for char in model)
    in_queue = f", position {position}" if position is not None else ""
    return f": waiting for {name}{in_queue}\n".encode()


def _event_start(data: bytes, floor: int, offset: int) -> int:
    """Return the start of the event at `offset`, at or after `floor`, the end of another."""
    for mark in (b"\n\n", b"\n\r\n"):
        if (found := data.rfind(mark, floor, offset)) >= 0:
            floor = found + len(mark)
    return floor


def _event_end(data: bytes, offset: int) -> int:
    """Return the end of the event at `offset`."""
    found = data.find(b"\n\n", offset)
    end = found + 2 if found >= 0 else len(data)
    found = data.find(b"\n\r\n", offset, end)
    return found + 3 if found >= 0 else end


def _payload(event: bytes) -> bytes:
    if event.startswith(b"data: ") and event.find(b"\n") == len(event) - 2 and event.endswith(b"\n"):
        return event[6:-2]
    lines = [line for line in event.splitlines() if line.startswith((b"data:", b"error:"))]
    return b"\n".join(line.partition(b":")[2].strip() for line in lines)


def _is_last(content: StreamEvent) -> bool:
    if content.choices:
        return any(choice.finish_reason for choice in content.choices)
    return isinstance(content.type, str) and content.type in _LAST_TYPES


def _is_whole(payload: bytes) -> bool:
    if payload == b"[DONE]":
        return True
    try:
        EVENT.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


def index_of(value: Any) -> int:
    """Return the index of a choice or call; 0, its usual value, if `value` is none."""
    return value if isinstance(value, int) and value >= 0 else 0


def _has_role(delta: dict[str, Any] | None) -> bool:
    return delta is not None and bool(delta.get("role"))


def _is_exact(reported: dict[str, Any]) -> bool:
    """Return whether the counts that every client reads are integers."""
    return all(type(reported.get(name, 0)) is int for name in ("prompt_tokens", "completion_tokens", "total_tokens"))


def _object_after(data: bytes, offset: int) -> bytes | None:
    """Return the next JSON object after `offset`. Counts braces, as no text in a usage has any."""
    start = data.find(b"{", offset)
    end = data.find(b"}", start) + 1
    while start >= 0 and end > 0:
        if data.count(b"{", start, end) == data.count(b"}", start, end):
            return data[start:end]
        end = data.find(b"}", end) + 1
    return None


def _decode_usage(data: bytes) -> Usage | None:
    try:
        return usage_of(msgspec.json.decode(data))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def usage_of(reported: Any) -> Usage | None:
    """Return the usage that an engine `reported`, in OpenAI's or Anthropic's form; None if it is no object."""
    return _usage(reported) if isinstance(reported, dict) else None


def _usage(reported: dict[str, Any]) -> Usage:
    prompt_details = reported.get("prompt_tokens_details") or reported.get("input_tokens_details")
    output_details = reported.get("completion_tokens_details") or reported.get("output_tokens_details")
    cache_read, cache_write = reported.get("cache_read_input_tokens"), reported.get("cache_creation_input_tokens")
    output = _count(reported.get("output_tokens"))
    if cache_read is not None or cache_write is not None:
        # Anthropic's `input_tokens` excludes cached tokens.
        cached = _count(cache_read)
        return Usage(_count(reported.get("input_tokens")) + cached + _count(cache_write), output, cached)
    completion = output if reported.get("completion_tokens") is None else _count(reported["completion_tokens"])
    prompt = _count(reported.get("input_tokens" if reported.get("prompt_tokens") is None else "prompt_tokens"))
    if not prompt:  # some engines report only a total for embeddings
        prompt = max(0, _count(reported.get("total_tokens")) - completion)
    return Usage(
        prompt, completion, _detail(prompt_details, "cached_tokens"), _detail(output_details, "reasoning_tokens")
    )


def _detail(details: Any, name: str) -> int:
    return _count(details.get(name)) if isinstance(details, dict) else 0


def _count(value: Any) -> int:
    """Return a number of tokens; remotes send `3`, `3.0` and `"3"`. Anything else is none."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return 0
    if not isinstance(value, int | float) or not 0 < value < _MAX_TOKENS:
        return 0
    return int(value)

"""What is read of answers on their way through: usage, the end, errors inside a stream. Pure; called by `proxy.py`.

Ordinary reads cost a few substring checks. An event is parsed only when it may carry one of those three.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec

from llm_api_server.errors import ApiError, anthropic_error_body, render
from llm_api_server.gateway.wire.endpoints import Dialect
from llm_api_server.gateway.wire.engine_errors import translate_error
from llm_api_server.ipc.usage_events import NO_USAGE, Usage

MAX_EVENT_BYTES = 16 * 1024 * 1024
_OVERLAP_BYTES = 1024
_EVENT_END = re.compile(rb"\r?\n\r?\n")
#: What an event may have in it that matters here. Texts cannot: JSON escapes their quotes.
_USAGE_MARK = b'"usage"'
_DONE_EVENT = b"data: [DONE]\n\n"
_ERROR_MARK, _DONE_MARK, _NULL_MARK = b'"error"', b"[DONE]", b": null\n"
#: The last event of a stream is looked for in so many bytes at the end of a read: to search takes time.
_LAST_BYTES = 64
_START_MARK = b'"message_start"'
#: In the first event of a chat: whoever asked for one answer need not be told the role again.
_ROLE_MARK = b'"delta":{"role":"'
_NO_USAGE = (b":null", b": null")
#: Of an event that brings a token; OpenAI's streams have hardly others. Single bytes are slower to count.
_TOKEN_MARKS: dict[Dialect, bytes] = {
    "openai": b"\n\n",
    "responses": b".delta\ndata:",
    "anthropic": b"event: content_block_delta",
}


class _Details(msgspec.Struct):
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class _UsageObject(msgspec.Struct):
    """OpenAI's chat, OpenAI's Responses and Anthropic's shape in one."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    total_tokens: int | None = None


class _WithUsage(msgspec.Struct):
    usage: _UsageObject | None = None


class _Delta(msgspec.Struct):
    role: str | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    finish_reason: str | None = None
    delta: _Delta | None = None


_NO_ERROR = msgspec.Raw(b"null")


class _Event(msgspec.Struct):
    id: str | None = None
    object: str | None = None
    created: int | None = None
    model: str | None = None
    choices: list[_Choice] | None = None
    usage: _UsageObject | None = None
    message: _WithUsage | str | None = None
    response: _WithUsage | None = None
    error: msgspec.Raw = _NO_ERROR


_EVENT, _USAGE = msgspec.json.Decoder(_Event), msgspec.json.Decoder(_UsageObject)


class StreamReader:
    """Reads one event stream while it is relayed, and decides what of it the client gets to see.

    `feed` returns whole events only, so that what is hidden or translated never shows in part. After `failed` nothing
    more is to be sent. OpenAI's usage chunk is held back to the end: with `show_usage` there is exactly one, though the
    engine sent one per choice or put the usage into other chunks; else none, though the gateway asked for it. With
    `is_chat` the first chunk of each choice has the role: llama.cpp leaves it out when the first token is not a whole
    character. For the same reason its messages may lack `message_start`: then `opening` begins the stream.
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
        self._mark, self._events_without_tokens = _TOKEN_MARKS[dialect], choices if is_chat else 0
        self._marked = 0
        self._tail = b""
        self._last: _Event | None = None
        self._prompt_tokens_of_choices = 0
        self._usage_chunks: list[bytes] = []
        self.usage: Usage | None = None
        self.failed: ApiError | None = None

    def feed(self, data: bytes) -> bytes:
        """The bytes to send on, perhaps none."""
        if self.failed is not None:
            return b""
        if self._tail:
            data = self._tail + data
            self._tail = b""
        if not data.endswith((b"\n\n", b"\n\r\n")):
            data = self._keep_tail(data)
        if self._opening and data.find(b"data:") >= 0:
            data = self._opened(data)
        self._marked += data.count(self._mark) or (data.count(b"\n\r\n") if self._dialect == "openai" else 0)
        if self._without_role and self._choices == 1:
            end = data.find(b"\n\n")
            if data.find(_ROLE_MARK, 0, end) >= 0:
                self._without_role.clear()
        # `find`: with `in`, bytes are tried as a number first, which fails at the price of an exception.
        is_ordinary = (
            not self._without_role
            and data.find(_USAGE_MARK) < 0
            and data.find(_ERROR_MARK) < 0
            and data.find(_DONE_MARK, -_LAST_BYTES) < 0
            and (self._is_chat or data.find(_NULL_MARK) < 0)
        )
        return data if is_ordinary else self._filter(data)

    def passes(self, frames: bytes) -> bool:
        """Whether events, still in their frames, are to be sent on as they are. Else `feed` must read them."""
        if (
            self._tail
            or self._without_role
            or self._opening
            or not frames.endswith(b"\n\n\r\n")
            or frames.find(_USAGE_MARK) >= 0
            or frames.find(_ERROR_MARK) >= 0
            or frames.find(_DONE_MARK, -_LAST_BYTES) >= 0
            or not (self._is_chat or frames.find(_NULL_MARK) < 0)
        ):
            return False
        self._marked += frames.count(self._mark)
        return True

    @property
    def usage_so_far(self) -> Usage:
        """What the engine said; before that the tokens that have come, by the number of events that carry one."""
        if self.usage is not None and self.usage.completion_tokens:
            return self.usage
        told = self.usage or NO_USAGE
        return msgspec.structs.replace(told, completion_tokens=self._tokens())

    def cut_off(self) -> None:
        """The connection is about to be closed: llama.cpp notices when it has made one more token of each choice."""
        if self._tokens() > 0:
            self._marked += self._choices

    def _tokens(self) -> int:
        return max(0, self._marked - self._events_without_tokens)

    def flush(self) -> bytes:
        """What is left when the engine ends its answer without an empty line."""
        tail, self._tail = self._tail, b""
        return tail + self._usage_chunk() if self.failed is None else b""

    def _opened(self, data: bytes) -> bytes:
        opening, self._opening = self._opening, b""
        return data if _START_MARK in data or _ERROR_MARK in data else opening + data

    def _keep_tail(self, data: bytes) -> bytes:
        end = max(data.rfind(b"\n\n") + 2, data.rfind(b"\n\r\n") + 3, 0)
        end = end if end > 2 else 0  # noqa: PLR2004 - rfind's -1 plus the length of the mark means: not found
        self._tail = data[end:]
        if len(self._tail) > MAX_EVENT_BYTES:
            self._tail = b""
            self.failed = translate_error(500, b"")
        return data[:end]

    def _filter(self, data: bytes) -> bytes:
        """Read the events that may have to be: the first of each choice, and those with a mark."""
        out: list[bytes] = []
        start = end = 0
        while end < len(data):
            copied = end
            if self._without_role:
                start, end = end, _event_end(data, end)
            elif len(data) - end == len(_DONE_EVENT) and data.endswith(_DONE_EVENT):
                start, end = end, len(data)
            elif (place := self._next_mark(data, end)) >= 0:
                start, end = _event_start(data, end, place), _event_end(data, place)
            else:
                out.append(data[end:])
                break
            out += data[copied:start], self._read_event(data[start:end])
            if self.failed is not None:
                break
        return b"".join(out)

    def _next_mark(self, data: bytes, start: int) -> int:
        """Where the next mark is; -1: nowhere. Behind the first that is found, none is looked for."""
        place = data.find(_USAGE_MARK, start)
        while place >= 0 and data.startswith(_NO_USAGE, place + len(_USAGE_MARK)):
            place = data.find(_USAGE_MARK, place + 1)  # some engines say so in every event
        others = [(_ERROR_MARK, start), (_DONE_MARK, max(start, len(data) - _LAST_BYTES))]
        if not self._is_chat:
            others.append((_NULL_MARK, start))
        for mark, first in others:
            found = data.find(mark, first, place if place >= 0 else len(data))
            place = found if found >= 0 else place
        return place

    def _read_event(self, event: bytes) -> bytes:
        payload = b"[DONE]" if event == _DONE_EVENT else _payload(event)
        if payload == b"[DONE]":
            return self._usage_chunk() + event
        if payload == b"null":  # llama.cpp opens a stream of several prompts with it; SDKs fall over it
            return b""
        try:
            content = _EVENT.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return event
        if content.error is not _NO_ERROR and bytes(content.error) != b"null":
            self.failed = translate_error(_status(content.error), payload)
            return error_event(self._dialect, self.failed)
        if self._without_role and content.choices:
            event = self._with_role(content.choices, payload, event)
        return self._read_usage(content, event)

    def _with_role(self, choices: list[_Choice], payload: bytes, event: bytes) -> bytes:
        first = {choice.index for choice in choices} & self._without_role
        if not first:
            return event
        self._without_role -= first
        if all(choice.delta and choice.delta.role for choice in choices if choice.index in first):
            return event
        chunk = msgspec.json.decode(payload, type=dict[str, Any])
        for choice in chunk["choices"]:
            if choice.get("index", 0) in first:
                choice["delta"] = {"role": "assistant", **(choice.get("delta") or {})}
        return b"data: " + msgspec.json.encode(chunk) + b"\n\n"

    def _read_usage(self, content: _Event, event: bytes) -> bytes:
        if content.choices is not None:
            self._last = content
        if isinstance(content.message, _WithUsage):
            self._note(content.message.usage)
        if content.response is not None:
            self._note(content.response.usage)
        if content.usage is None:
            return event
        if content.choices == []:
            self._add_usage_chunk(content.usage, event)
            return b""
        if content.choices is None:
            self._note(content.usage)
        elif any(choice.finish_reason for choice in content.choices):
            self._add_choice(content.usage)
        return event

    def _note(self, seen: _UsageObject | None) -> None:
        """Anthropic's streams tell the prompt first and the answer last: later numbers complete earlier ones."""
        if seen is None:
            return
        now = _usage(seen)
        before = self.usage or Usage()
        self.usage = Usage(
            prompt_tokens=now.prompt_tokens or before.prompt_tokens,
            completion_tokens=now.completion_tokens or before.completion_tokens,
            cached_tokens=now.cached_tokens or before.cached_tokens,
            reasoning_tokens=now.reasoning_tokens or before.reasoning_tokens,
        )

    def _add_choice(self, seen: _UsageObject) -> None:
        """llama.cpp's text completions tell the usage of each choice in its last chunk."""
        now = _usage(seen)
        before = self.usage or Usage()
        self._prompt_tokens_of_choices += now.prompt_tokens
        self.usage = Usage(
            prompt_tokens=self._prompt_tokens_of_choices // self._choices or now.prompt_tokens,
            completion_tokens=before.completion_tokens + now.completion_tokens,
            cached_tokens=before.cached_tokens + now.cached_tokens,
            reasoning_tokens=before.reasoning_tokens + now.reasoning_tokens,
        )

    def _add_usage_chunk(self, seen: _UsageObject, event: bytes) -> None:
        """llama.cpp sends one for each choice, all with the same prompt."""
        now = _usage(seen)
        before = self.usage if self._usage_chunks and self.usage is not None else Usage()
        self._usage_chunks.append(event)
        self.usage = Usage(
            prompt_tokens=max(now.prompt_tokens, before.prompt_tokens),
            completion_tokens=now.completion_tokens + before.completion_tokens,
            cached_tokens=max(now.cached_tokens, before.cached_tokens),
            reasoning_tokens=now.reasoning_tokens + before.reasoning_tokens,
        )

    def _usage_chunk(self) -> bytes:
        """The one usage chunk, or nothing; the engine's own where it sent just one."""
        held, self._usage_chunks = self._usage_chunks, []
        if not self._show_usage or self.usage is None or self._last is None:
            return b""
        self._show_usage = False
        if len(held) == 1:
            return held[0]
        head = self._last
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
    """Finds `usage` in a JSON answer that is relayed in pieces, wherever in it the engine puts it."""

    _tail = b""
    usage: Usage | None = None

    def feed(self, data: bytes) -> bytes:
        """Nothing of it changes."""
        window = self._tail + data if self._tail else data
        place = window.rfind(b'"usage"')  # engines put it last
        if place >= 0 and (found := _object_after(window, place)) is not None:
            self.usage = _decode_usage(found) or self.usage
        self._tail = window[-_OVERLAP_BYTES:]
        return data


def events(data: bytes) -> Iterator[bytes]:
    """The payloads of the whole events in `data`."""
    for event in _EVENT_END.split(data):
        if payload := _payload(event):
            yield payload


def message_start(message_id: str, model: str, prompt_tokens: int) -> bytes:
    """The event that Anthropic's streams begin with."""
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


def error_event(dialect: Dialect, error: ApiError) -> bytes:
    """The event that ends a stream which failed after its first byte."""
    if dialect == "anthropic":
        return b"event: error\ndata: " + anthropic_error_body(error.status, error.message) + b"\n\n"
    if dialect == "responses":
        event = {
            "type": "error",
            "code": error.code or error.type,
            "message": error.message,
            "param": error.param,
            "sequence_number": 0,
        }
        return b"event: error\ndata: " + msgspec.json.encode(event) + b"\n\n"
    return b"data: " + render(error) + b"\n\n"


def waiting_comment(model: str, position: int | None) -> bytes:
    """A comment line that clients skip and that keeps proxies from closing a silent connection."""
    name = "".join(char if char.isprintable() else "?" for char in model)
    place = f", position {position}" if position is not None else ""
    return f": waiting for {name}{place}\n\n".encode()


def _event_start(data: bytes, floor: int, place: int) -> int:
    """Of the event that `place` is in, where another ends at `floor`."""
    for mark in (b"\n\n", b"\n\r\n"):
        if (found := data.rfind(mark, floor, place)) >= 0:
            floor = found + len(mark)
    return floor


def _event_end(data: bytes, place: int) -> int:
    """Of the event that `place` is in."""
    found = data.find(b"\n\n", place)
    end = found + 2 if found >= 0 else len(data)
    found = data.find(b"\n\r\n", place, end)
    return found + 3 if found >= 0 else end


def _payload(event: bytes) -> bytes:
    if event.startswith(b"data: ") and event.find(b"\n") == len(event) - 2 and event.endswith(b"\n"):
        return event[6:-2]
    lines = [line for line in event.splitlines() if line.startswith((b"data:", b"error:"))]
    return b"\n".join(line.partition(b":")[2].strip() for line in lines)


def _status(error: msgspec.Raw) -> int:
    try:
        code = msgspec.json.decode(error)["code"]
    except (TypeError, KeyError):
        return 500
    return code if isinstance(code, int) and 400 <= code <= 599 else 500  # noqa: PLR2004


def _object_after(data: bytes, place: int) -> bytes | None:
    """The JSON object that is the next value, as far as braces tell: there are none in the texts of a usage."""
    start = data.find(b"{", place)
    end = data.find(b"}", start) + 1
    while start >= 0 and end > 0:
        if data.count(b"{", start, end) == data.count(b"}", start, end):
            return data[start:end]
        end = data.find(b"}", end) + 1
    return None


def _decode_usage(data: bytes) -> Usage | None:
    try:
        return _usage(_USAGE.decode(data))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _usage(seen: _UsageObject) -> Usage:
    details = seen.prompt_tokens_details or seen.input_tokens_details
    of_answer = seen.completion_tokens_details or seen.output_tokens_details
    reasoning = (of_answer.reasoning_tokens if of_answer else None) or 0
    if seen.cache_read_input_tokens is not None or seen.cache_creation_input_tokens is not None:
        # Anthropic counts cached tokens apart from `input_tokens`.
        cached = seen.cache_read_input_tokens or 0
        prompt = (seen.input_tokens or 0) + cached + (seen.cache_creation_input_tokens or 0)
        return Usage(prompt, seen.output_tokens or 0, cached)
    completion = seen.completion_tokens if seen.completion_tokens is not None else seen.output_tokens
    prompt_tokens = seen.prompt_tokens if seen.prompt_tokens is not None else seen.input_tokens
    if not prompt_tokens and seen.total_tokens:  # some engines give embeddings only a total
        prompt_tokens = max(0, seen.total_tokens - (completion or 0))
    return Usage(prompt_tokens or 0, completion or 0, (details.cached_tokens if details else None) or 0, reasoning)

"""Reader of a remote's event stream, which may be framed in any way and is checked event by event. Pure."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from llm_api_server.errors import BadEngineResponse
from llm_api_server.gateway.wire.endpoints import Dialect
from llm_api_server.gateway.wire.engine_errors import error_status, translate_error
from llm_api_server.gateway.wire.event_framing import EventFraming
from llm_api_server.gateway.wire.stream_reader import EVENT, MAX_EVENT_BYTES, StreamEvent, StreamReader

_DATA, _END = b"data: ", b"\n\n"
#: Line ends of an HTTP chunk with one event of the usual form, after the line with its length.
_LINE_ENDS = 3
_DECODE_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class RemoteStreamReader(StreamReader):
    """Stream reader whose client gets every event in one form, whatever the remote's framing.

    An event that is no JSON object, or has `choices` that are no objects, is an engine error. Comments, ids and retry
    times of the remote are not relayed; a comment within the stream becomes an empty one, to keep the connection.
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
        super().__init__(dialect, show_usage=show_usage, is_chat=is_chat, choices=choices, opening=opening)
        self._framing = EventFraming()
        self._has_begun = False

    def feed(self, data: bytes) -> bytes:
        if self.failed is not None:
            return b""
        return self._read_all(self._framing.feed(data))

    def passes(self, chunks: bytes) -> bool:
        """Return whether `chunks` is one chunk with one whole event in the usual form, which needs no change."""
        start = chunks.find(b"\n") + 1
        if (
            not chunks.startswith(_DATA, start)
            or chunks.count(b"\n", start) != _LINE_ENDS
            or chunks.find(b"\r", start) != len(chunks) - 2
            or not self._framing.is_between_events
        ):
            return False
        try:
            content = EVENT.decode(chunks[start + len(_DATA) : -4])
        except _DECODE_ERRORS:
            return False
        if content.choices is None or not super().passes(chunks):
            return False
        self._last_chunk = content
        self.is_complete = self.is_complete or any(choice.finish_reason for choice in content.choices)
        return True

    def _rest(self) -> bytes:
        return self._read_all(self._framing.flush(), is_last=True) if self.failed is None else b""

    def _read_all(self, events: Iterable[tuple[bytes | None, bytes]], *, is_last: bool = False) -> bytes:
        out: list[bytes] = []
        for name, payload in events:
            if name is not None:
                out.append(self._read_named(name, payload, is_last=is_last))
            elif self._has_begun:
                out.append(b":\n")
            if self.failed is not None:
                break
        if self.failed is None and self._framing.buffered_bytes > MAX_EVENT_BYTES:
            out.append(self._fail(BadEngineResponse("The engine sent an event that is too long.")))
        return b"".join(out)

    def _read_named(self, name: bytes, payload: bytes, *, is_last: bool) -> bytes:
        if payload == b"[DONE]":
            self.is_complete = self._has_begun
            is_sent = self._has_begun and self._dialect == "openai"
            return self._usage_chunk() + (_DATA + payload + _END if is_sent else b"")
        self._has_begun = True
        if payload == b"null":
            return b""
        try:
            content = EVENT.decode(payload)
        except _DECODE_ERRORS:
            return self._unreadable(name, payload, is_last=is_last)
        if name == b"error" and not content.error:
            return self._fail(translate_error(_flat_status(payload), payload))
        if isinstance(content.sequence_number, int):
            self.next_sequence_number = content.sequence_number + 1
        event = self._read_content(content, payload, self._framed(name, content, payload))
        if self.failed is None:
            self._token_events += event.count(self._token_mark)
            if self._opening and event:
                event = self._with_opening(event)
        return event

    def _unreadable(self, name: bytes, payload: bytes, *, is_last: bool) -> bytes:
        """Fail for an event that is no chunk. A last one that is cut off is left to the end of the stream."""
        if name == b"error" or payload.startswith(b"["):  # Google reports errors in a list
            return self._fail(translate_error(_flat_status(payload), payload))
        if is_last:
            return b""
        return self._fail(BadEngineResponse("The engine sent an event that could not be understood."))

    def _framed(self, name: bytes, content: StreamEvent, payload: bytes) -> bytes:
        """Return the event as the dialect frames it; some remotes leave out the names."""
        if self._dialect == "openai":
            return _DATA + payload + _END
        if not name and isinstance(content.type, str) and content.type.isascii() and content.type.isprintable():
            name = content.type.encode()
        return b"event: %b\n%b%b%b" % (name, _DATA, payload, _END) if name else _DATA + payload + _END


def _flat_status(payload: bytes) -> int:
    try:
        content = msgspec.json.decode(payload)
    except _DECODE_ERRORS:
        return 500
    if isinstance(content, list):
        content = next((item for item in content if isinstance(item, dict)), None)
    return (error_status(content.get("error") or content) if isinstance(content, dict) else None) or 500

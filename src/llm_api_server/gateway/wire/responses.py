"""Conversion of engine responses to client responses, read by read. Pure.

The head goes out with the first bytes of the body; until then an error can have a status of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol

import msgspec

from llm_api_server.errors import ApiError, BadEngineResponse, EngineError
from llm_api_server.gateway.wire.endpoints import Dialect
from llm_api_server.gateway.wire.engine_errors import error_in_response, translate_error
from llm_api_server.gateway.wire.stream_assembler import StreamAssembler
from llm_api_server.gateway.wire.stream_reader import BodyReader, StreamReader, error_event, usage_of
from llm_api_server.ipc.usage_events import Usage

_MAX_ERROR_BYTES = 64 * 1024
#: Largest response that is converted as a whole.
_MAX_CONVERTED_BYTES = 256 * 1024 * 1024
FIRST_ERROR_STATUS = 400
_BOM = b"\xef\xbb\xbf"
#: Bytes of a body that is no JSON that are looked at to describe it.
_SEARCHED_BYTES = 1024
_KINDS = {type(None): "`null`", list: "a list instead of an object", str: "a text instead of an object"}
EVENT_STREAM = "text/event-stream"
JSON = "application/json"
#: Header lines of an event stream.
STREAM_HEAD = b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n"


class EngineResponse(Protocol):
    """One engine response on its way to the client. `head` holds header lines.

    If `is_stream`, an error after the first byte is sent as an event.
    """

    status: int
    is_stream: bool

    @property
    def reader(self) -> StreamReader | None:
        """Reader of the engine's stream; None if the engine does not stream."""

    @property
    def failed(self) -> ApiError | None:
        """Error that ended the stream and was sent as its last event."""

    @property
    def head(self) -> bytes: ...

    @property
    def usage(self) -> Usage | None:
        """Token counts that the engine has reported so far."""

    def feed(self, data: bytes) -> bytes:
        """Return the bytes to send now. Raises `ApiError` for an error to send instead of a response."""

    def end(self) -> bytes:
        """Return the last bytes to send, once the engine's response is complete. Raises `ApiError`."""


class StreamResponse:
    """An event stream, relayed as it arrives."""

    status = 200
    head = STREAM_HEAD
    is_stream = True

    def __init__(self, reader: StreamReader, dialect: Dialect) -> None:
        self.reader = reader
        self._dialect = dialect
        self._is_started = False

    @property
    def usage(self) -> Usage | None:
        return self.reader.usage

    @property
    def failed(self) -> ApiError | None:
        return self.reader.failed

    def feed(self, data: bytes) -> bytes:
        out = self.reader.feed(data)
        return out if self._is_started else self._first(out)

    def end(self) -> bytes:
        out = self.reader.flush()
        return out if self._is_started else self._first(out)

    def _first(self, out: bytes) -> bytes:
        failed = self.reader.failed
        if failed is not None and out == error_event(self._dialect, failed, self.reader.next_sequence_number):
            raise failed  # vLLM reports an invalid schema this way: status 200, then an error as the only event
        self._is_started = bool(out)
        return out


class PlainResponse(BodyReader):
    """A body that is relayed byte for byte."""

    is_stream = False
    failed = None
    reader = None

    def __init__(self, status: int, headers: dict[str, str]) -> None:
        super().__init__()
        self.status = status
        self._headers = headers

    @property
    def head(self) -> bytes:
        return _plain_head(self._headers.get("content-type", JSON), self._headers.get("content-length"))

    def end(self) -> bytes:
        return b""


@lru_cache(1024)
def _plain_head(kind: str, length: str | None) -> bytes:
    lines = f"content-type: {kind}\r\n"
    return (lines if length is None else f"{lines}content-length: {length}\r\n").encode("latin-1")


class _WholeResponse:
    """A response that is sent when the engine's is complete."""

    status = 200
    is_stream = False
    failed = None
    reader: StreamReader | None = None

    def __init__(self) -> None:
        self._length = 0

    @property
    def head(self) -> bytes:
        return b"content-type: application/json\r\ncontent-length: %d\r\n" % self._length


class AssembledResponse(_WholeResponse):
    """An event stream that the client gets as one JSON body."""

    def __init__(self, reader: StreamReader, dialect: Dialect) -> None:
        super().__init__()
        self.reader: StreamReader = reader
        self._assembler = StreamAssembler(dialect)

    @property
    def usage(self) -> Usage | None:
        return self.reader.usage

    def feed(self, data: bytes) -> bytes:
        self._assembler.feed(self.reader.feed(data))
        if self.reader.failed is not None:
            raise self.reader.failed
        return b""

    def end(self) -> bytes:
        self._assembler.feed(self.reader.flush())
        if self.reader.failed is not None:
            raise self.reader.failed
        body = self._assembler.body()
        self._length = len(body)
        return body


class ConvertedResponse(_WholeResponse):
    """A JSON body that `convert` changes to another form."""

    usage: Usage | None = None

    def __init__(self, convert: Callable[[bytes], bytes]) -> None:
        super().__init__()
        self._convert = convert
        self._body = bytearray()

    def feed(self, data: bytes) -> bytes:
        self._body += data
        if len(self._body) > _MAX_CONVERTED_BYTES:
            raise EngineError("The engine's response is too long.")
        return b""

    def end(self) -> bytes:
        body = self._convert(bytes(self._body))
        self._length = len(body)
        return body


class _PlainBody(msgspec.Struct):
    """Members of a JSON response that are read."""

    error: Any = None
    errors: Any = None
    type: Any = None
    choices: Any = None
    usage: Any = None
    response: Any = None


class CheckedResponse(_WholeResponse):
    """A remote's plain response, relayed byte for byte if it is one: a JSON object without an error.

    `source` names the remote in errors. With `has_choices` there must be some, with `is_list_allowed` a list will do.
    A response to a request for a stream is only read for its error, so it always raises.
    """

    usage: Usage | None = None

    def __init__(
        self, source: str, *, has_choices: bool = False, is_list_allowed: bool = False, expects_stream: bool = False
    ) -> None:
        super().__init__()
        self._source = source
        self._has_choices = has_choices
        self._is_list_allowed = is_list_allowed
        self._expects_stream = expects_stream
        self._body = bytearray()

    def feed(self, data: bytes) -> bytes:
        self._body += data
        if len(self._body) > _MAX_CONVERTED_BYTES:
            raise BadEngineResponse(f"{self._source} sent a response that is too long.")
        return b""

    def end(self) -> bytes:
        body = bytes(self._body).removeprefix(_BOM)
        self._check(body)
        self._length = len(body)
        return body

    def _check(self, body: bytes) -> None:
        try:
            content = msgspec.json.decode(body, type=_PlainBody)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self._check_other(body)
            return
        error = content.error or (content.errors if content.choices is None else None)
        if error or content.type == "error":
            raise error_in_response(error, body, self._source)
        if self._expects_stream:
            raise self._bad("JSON instead of an event stream")
        if self._has_choices and not (isinstance(content.choices, list) and content.choices):
            raise self._bad("a completion without choices")
        self.usage = usage_of(content.usage)

    def _check_other(self, body: bytes) -> None:
        """Raise an error for a body that is no JSON object."""
        try:
            content = msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise self._bad(_described(body)) from None
        if isinstance(content, list) and (first := next(filter(_is_object, content), None)) and first.get("error"):
            raise error_in_response(first["error"], body, self._source)
        if not (self._is_list_allowed and isinstance(content, list) and content):
            raise self._bad(_KINDS.get(type(content), "JSON that is no object"))

    def _bad(self, what: str) -> ApiError:
        return BadEngineResponse(f"{self._source} responded with {what}.")


def _is_object(item: Any) -> bool:
    return isinstance(item, dict)


def _described(body: bytes) -> str:
    """Return the words for a body that is no JSON."""
    start = body[:_SEARCHED_BYTES].lstrip().lower()
    if not start:
        return "an empty body"
    if start.startswith((b"<!doctype html", b"<html", b"<")):
        return "an HTML page; its path in the configuration may be wrong, or a proxy in front of it asks for a login"
    return "a body that is not JSON"


class ErrorResponse(_WholeResponse):
    """An engine's error response; `end` raises it, translated.

    `retry_after` is in seconds. With `is_readable` False the body is in a coding that cannot be decoded.
    """

    usage: Usage | None = None

    def __init__(self, status: int, *, retry_after: float | None = None, is_readable: bool = True) -> None:
        super().__init__()
        self._engine_status = status
        self._retry_after = retry_after
        self._is_readable = is_readable
        self._body = bytearray()

    def feed(self, data: bytes) -> bytes:
        if self._is_readable:
            self._body += data[: _MAX_ERROR_BYTES - len(self._body)]
        return b""

    def end(self) -> bytes:
        raise translate_error(self._engine_status, bytes(self._body), retry_after=self._retry_after)

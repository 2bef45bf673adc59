"""How each kind of an engine's answer becomes the client's. Pure; chosen and driven by `exchange.py`.

An answer is fed with what every read brought and returns what the client gets of it now; its head is sent with the
first bytes, so that until then an error can have a status of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

from llm_api_server.errors import ApiError, EngineError
from llm_api_server.gateway.wire.endpoints import Dialect
from llm_api_server.gateway.wire.engine_errors import translate_error
from llm_api_server.gateway.wire.stream_assembler import StreamAssembler
from llm_api_server.gateway.wire.stream_reader import BodyReader, StreamReader, error_event
from llm_api_server.ipc.usage_events import Usage

MAX_ERROR_BYTES = 64 * 1024
MAX_TOKENS_BYTES = 256 * 1024 * 1024
FIRST_ERROR_STATUS = 400
EVENT_STREAM = "text/event-stream"
JSON = "application/json"
#: Headers, as lines of a head.
STREAM_HEAD = b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n"


class EngineResponse(Protocol):
    """`status` and the lines of `head` go before the first bytes; with `is_stream` an event may tell of a failure."""

    status: int
    is_stream: bool

    @property
    def reader(self) -> StreamReader | None:
        """Counts what comes, where that is a stream."""

    @property
    def failed(self) -> ApiError | None:
        """The error that was the last of its bytes."""

    @property
    def head(self) -> bytes: ...

    @property
    def usage(self) -> Usage | None:
        """What the engine said of its use, as far as it has."""

    def feed(self, data: bytes) -> bytes:
        """Raises `ApiError` for what the client must get instead."""

    def end(self) -> bytes:
        """The engine's answer is complete; what the client still gets. Raises `ApiError`."""


class StreamResponse:
    """An event stream as it comes."""

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
        if self._is_started:
            return out
        failed = self.reader.failed
        if failed is not None and out == error_event(self._dialect, failed):
            raise failed  # vLLM's way to say that a schema is bad
        self._is_started = bool(out)
        return out

    def end(self) -> bytes:
        return self.reader.flush()


class PlainResponse(BodyReader):
    """Any other body, byte for byte."""

    is_stream = False
    failed = None
    reader = None

    def __init__(self, status: int, headers: dict[str, str]) -> None:
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


class _Whole:
    """An answer that is only known when the engine's is complete."""

    status = 200
    is_stream = False
    failed = None
    reader: StreamReader | None = None

    def __init__(self) -> None:
        self._length = 0

    @property
    def head(self) -> bytes:
        return b"content-type: application/json\r\ncontent-length: %d\r\n" % self._length


class AssembledResponse(_Whole):
    """The engine streams, the client gets one JSON answer."""

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
        body = self._assembler.body()
        self._length = len(body)
        return body


class ConvertedResponse(_Whole):
    """A JSON answer that `convert` puts into another form."""

    usage: Usage | None = None

    def __init__(self, convert: Callable[[bytes], bytes]) -> None:
        super().__init__()
        self._convert = convert
        self._body = bytearray()

    def feed(self, data: bytes) -> bytes:
        self._body += data
        if len(self._body) > MAX_TOKENS_BYTES:
            raise EngineError("The engine's answer is too long.")
        return b""

    def end(self) -> bytes:
        body = self._convert(bytes(self._body))
        self._length = len(body)
        return body


class ErrorResponse(_Whole):
    """An engine's refusal; its end raises it as ours."""

    usage: Usage | None = None

    def __init__(self, status: int, headers: dict[str, str]) -> None:
        super().__init__()
        self._engine_status = status
        self._retry_after = headers.get("retry-after")
        self._body = bytearray()

    def feed(self, data: bytes) -> bytes:
        self._body += data[: MAX_ERROR_BYTES - len(self._body)]
        return b""

    def end(self) -> bytes:
        raise translate_error(self._engine_status, bytes(self._body), retry_after=self._retry_after)

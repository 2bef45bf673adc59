"""What is known of one request when it is over: filled in by the layers it passes, logged by the outermost."""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import Mapping, MutableMapping
from typing import Any

import msgspec

from llm_api_server.auth.access import Key
from llm_api_server.gateway.wire.stream_reader import StreamReader
from llm_api_server.ipc.trace_context import TraceContext
from llm_api_server.ipc.usage_events import NO_USAGE, Usage
from llm_api_server.log import log_lines

#: Status of a request whose client left before the answer (nginx's word for it).
CLIENT_CLOSED_REQUEST = 499
#: Seconds that a request's line waits for others: how much of the log a killed worker can take with it.
WRITE_INTERVAL = 0.1
MAX_ID_CHARS = 128
_VISIBLE_ASCII = frozenset(range(0x21, 0x7F))
_MAX_CHARS = 300
_SCOPE_KEY = "llm_api_server.record"


class RequestRecord(msgspec.Struct):
    """One per request, created with its id. `seconds` is the whole time; `status` what the client saw first.

    `admission` is its number among those that limits count, `row` its name in the ledger; each None where there is
    none. Seconds are counted from the start: until it had an instance (`queued_seconds`), until the client's first byte
    and until the engine's.
    """

    request_id: str
    method: str
    path: str
    started_at: float
    key: Key | None = None
    by_token: bool = False
    model: str | None = None
    stream: bool = False
    status: int = 0
    error: str | None = None
    usage: Usage | None = None
    seconds: float = 0.0
    first_byte_seconds: float | None = None
    queued_seconds: float | None = None
    first_token_seconds: float | None = None
    instance: str | None = None
    #: In the queue of its model, once that is told.
    position: int | None = None
    #: What is settled with, once it is over.
    used: Usage = NO_USAGE
    admission: int | None = None
    #: Headers that tell how its key stands, once that is known.
    limit_lines: bytes | None = None
    row: str | None = None
    #: Where it is traced.
    trace: TraceContext | None = None
    #: Kept with the row where that is wanted.
    prompt: str | None = None
    #: Tokens of the prompt as far as its length tells, from the moment an engine has it.
    prompt_estimate: int = 0
    #: Counts what has come of a stream.
    reader: StreamReader | None = None
    extra_headers: list[tuple[bytes, bytes]] = []

    def usage_or_estimate(self) -> Usage:
        """What the engine said; while it has said nothing, what has come and what the length of the prompt tells."""
        usage = self.usage or (self.reader.usage_so_far if self.reader is not None else NO_USAGE)
        if usage.prompt_tokens or not self.prompt_estimate:
            return usage
        return msgspec.structs.replace(usage, prompt_tokens=self.prompt_estimate)

    def elapsed(self) -> float:
        return time.monotonic() - self.started_at

    def line(self) -> str:
        """For the log."""
        model, path = "" if self.model is None else f" model={self.model}", self.path
        if not (path.isprintable() and len(path) <= _MAX_CHARS):
            path = _printable(path)
        if not (model.isprintable() and len(model) <= _MAX_CHARS):
            model = _printable(model)
        usage = self.usage
        tokens = (
            f" prompt_tokens={usage.prompt_tokens} completion_tokens={usage.completion_tokens}"
            if usage is not None
            else ""
        )
        ttft = f" ttft={self.first_byte_seconds:.3f}s" if self.first_byte_seconds is not None else ""
        error = f" error={_printable(self.error)}" if self.error is not None else ""
        name = self.key.name if self.key is not None else "-"
        return (
            f"{self.method} {path} {self.status} key={name}{model}{tokens}{ttft} "
            f"seconds={self.seconds:.3f} id={self.request_id}{error}"
        )


class RequestLog:
    """Gives requests their ids, and writes their lines a few times a second, all that have come together."""

    def __init__(self) -> None:
        self._prefix = uuid.uuid4().hex[:20]
        self._numbers = itertools.count(1)
        self._lines: dict[str, list[str]] = {"DEBUG": [], "INFO": []}
        self._timer: asyncio.TimerHandle | None = None

    def id_of(self, headers: Mapping[bytes, bytes]) -> str:
        """The client's own if it is short and visible ASCII, else a new one: this worker's prefix and a number."""
        value = headers.get(b"x-request-id")
        if value is not None and 0 < len(value) <= MAX_ID_CHARS and _VISIBLE_ASCII.issuperset(value):
            return value.decode("ascii")
        return f"req_{self._prefix}{next(self._numbers):012x}"

    def add(self, record: RequestRecord) -> None:
        """Requests that never touch a model are of interest to few."""
        level = "INFO" if record.model is not None or record.error is not None else "DEBUG"
        self._lines[level].append(record.line())
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(WRITE_INTERVAL, self.flush)

    def flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for level, lines in self._lines.items():
            if lines:
                log_lines(level, lines)
                lines.clear()


def attach(scope: MutableMapping[str, Any], record: RequestRecord) -> None:
    scope[_SCOPE_KEY] = record


def record_of(scope: MutableMapping[str, Any]) -> RequestRecord:
    """The record that the outermost middleware attached."""
    record = scope[_SCOPE_KEY]
    assert isinstance(record, RequestRecord)
    return record


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text[:_MAX_CHARS])

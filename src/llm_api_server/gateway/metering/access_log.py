"""The access log: one line per request, written in batches on the worker's loop, and the ids of requests."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Mapping

from llm_api_server.gateway.metering.request_record import RequestRecord
from llm_api_server.log import log_lines

#: Seconds between two writes: a killed worker loses at most the lines of this time.
WRITE_INTERVAL = 0.1
MAX_ID_CHARS = 128
_VISIBLE_ASCII = frozenset(range(0x21, 0x7F))
_MAX_CHARS = 300


class AccessLog:
    """Gives requests their ids and writes their lines."""

    def __init__(self) -> None:
        self._prefix = uuid.uuid4().hex[:20]
        self._numbers = itertools.count(1)
        self._lines: dict[str, list[str]] = {"DEBUG": [], "INFO": []}
        self._timer: asyncio.TimerHandle | None = None

    def id_of(self, headers: Mapping[bytes, bytes]) -> str:
        """Return the client's id if it is short and visible ASCII, else a new one: the worker's prefix and a number."""
        value = headers.get(b"x-request-id")
        if value is not None and 0 < len(value) <= MAX_ID_CHARS and _VISIBLE_ASCII.issuperset(value):
            return value.decode("ascii")
        return f"req_{self._prefix}{next(self._numbers):012x}"

    def add(self, record: RequestRecord) -> None:
        """Log a finished request: INFO if it has a model or an error, else DEBUG."""
        level = "INFO" if record.model is not None or record.error is not None else "DEBUG"
        self._lines[level].append(_line(record))
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


def _line(record: RequestRecord) -> str:
    model, path = "" if record.model is None else f" model={record.model}", record.path
    if not (path.isprintable() and len(path) <= _MAX_CHARS):
        path = _printable(path)
    if not (model.isprintable() and len(model) <= _MAX_CHARS):
        model = _printable(model)
    usage = record.usage
    tokens = (
        f" prompt_tokens={usage.prompt_tokens} completion_tokens={usage.completion_tokens}" if usage is not None else ""
    )
    ttft = f" ttft={record.first_byte_seconds:.3f}s" if record.first_byte_seconds is not None else ""
    error = f" error={_printable(record.error)}" if record.error is not None else ""
    name = record.key.name if record.key is not None else "-"
    return (
        f"{record.method} {path} {record.status} key={name}{model}{tokens}{ttft} "
        f"seconds={record.seconds:.3f} id={record.request_id}{error}"
    )


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text[:_MAX_CHARS])

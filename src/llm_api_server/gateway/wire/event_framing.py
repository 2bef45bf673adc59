"""Lines of an event stream, read by the rules of server-sent events and beyond them. Pure.

Remotes end lines with LF, CRLF or CR, begin with a byte-order mark, part events by one line end instead of two, and end
without any.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

_BOM = b"\xef\xbb\xbf"
_DONE = b"[DONE]"
#: Lines of one event after which it is no longer tried whether the event is complete without an empty line.
_MAX_TRIED_LINES = 64


class EventFraming:
    """Parser of one stream. Events are pairs of name and data; a comment is `(None, b"")`.

    An event ends where its data is a whole JSON object (or `[DONE]`), at an empty line, or at the end of the stream.
    """

    def __init__(self) -> None:
        self._tail = b""
        self._follows_return = False
        self._is_first_line = True
        self._name = b""
        self._lines: list[bytes] = []

    @property
    def is_between_events(self) -> bool:
        return not (self._tail or self._lines or self._name or self._follows_return or self._is_first_line)

    @property
    def buffered_bytes(self) -> int:
        """Bytes of the event that is not complete."""
        return len(self._tail) + sum(map(len, self._lines))

    def feed(self, data: bytes) -> Iterator[tuple[bytes | None, bytes]]:
        """Yield the events that `data` completes."""
        if not data:
            return
        if self._follows_return and data.startswith(b"\n"):
            data = data[1:]  # the second half of CRLF
        self._follows_return = data.endswith(b"\r")
        lines = (self._tail + data).splitlines(keepends=True)
        self._tail = lines.pop() if lines and not lines[-1].endswith((b"\n", b"\r")) else b""
        for line in lines:
            yield from self._read_line(line.rstrip(b"\r\n"))

    def flush(self) -> Iterator[tuple[bytes | None, bytes]]:
        """Yield the event that the end of the stream completes."""
        tail, self._tail = self._tail, b""
        if tail:
            yield from self._read_line(tail)
        yield from self._dispatch()

    def _read_line(self, line: bytes) -> Iterator[tuple[bytes | None, bytes]]:
        if self._is_first_line:
            self._is_first_line = False
            line = line.removeprefix(_BOM)
        if not line:
            yield from self._dispatch()
        elif line.startswith(b":"):
            yield None, b""
        elif line.startswith(b"event:"):
            self._name = line[6:].strip()
        elif line.startswith(b"error:"):  # llama.cpp of old
            self._name = b"error"
            yield from self._add(line[6:].strip())
        elif line.startswith(b"data:"):
            yield from self._add(line[5:].strip())
        elif line.startswith(b"{"):  # a JSON body in place of a stream, usually an error
            yield from self._add(line.strip())

    def _add(self, data: bytes) -> Iterator[tuple[bytes | None, bytes]]:
        self._lines.append(data)
        if data == _DONE or (data.endswith(b"}") and len(self._lines) <= _MAX_TRIED_LINES):
            whole = b" ".join(self._lines)
            if data == _DONE or is_json(whole):
                yield from self._dispatch()

    def _dispatch(self) -> Iterator[tuple[bytes | None, bytes]]:
        name, self._name = self._name, b""
        data, self._lines = b" ".join(self._lines), []
        if data:
            yield name, data


def is_json(data: bytes) -> bool:
    try:
        msgspec.json.decode(data, type=msgspec.Raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True

"""Headers as the lines of a head (RFC 9112, 5)."""

from __future__ import annotations

from collections.abc import Sequence

Headers = Sequence[tuple[bytes, bytes]]


def lines_of(headers: Headers) -> bytes:
    """Return each header as `name: value` and CRLF."""
    return b"".join([b"%b: %b\r\n" % header for header in headers])


def headers_of(lines: bytes) -> list[tuple[bytes, bytes]]:
    """Return the headers that `lines_of` has written."""
    return [(name, value) for name, _, value in (line.partition(b": ") for line in lines.split(b"\r\n") if line)]


class CachedLines:
    """Lines of a list of headers that is seldom replaced: uvicorn makes its default headers anew once a second."""

    def __init__(self) -> None:
        self._headers: Headers = ()
        self._lines = b""

    def of(self, headers: Headers) -> bytes:
        """Return the lines of `headers`, as built before if this is the same list object."""
        if headers is not self._headers:
            self._headers, self._lines = headers, lines_of(headers)
        return self._lines

"""Responses in the form that engines usually send: a head that repeats, chunks that arrive whole. Pure.

Any other form is left to the parser (httptools) of `Connection`.
"""

from __future__ import annotations

from functools import lru_cache

#: Returned instead of a length: the body is chunked (RFC 9112, section 7.1).
CHUNKED = -2
_LENGTH, _TYPE = b"\r\ncontent-length:", b"\r\ncontent-type:"
_CODING, _CONNECTION = b"\r\ntransfer-encoding:", b"\r\nconnection:"
_CONTENT_CODING = b"\r\ncontent-encoding:"
_CHUNKED = _CODING + b" chunked\r\n"
#: Length of a chunk by its first line. Longer chunks, and other spellings of a length, are left to the parser.
_CHUNK_LENGTHS = {b"%x" % length: length for length in range(1024)}
_LONGEST_LINE = 5


@lru_cache(256)
def read_head(head: bytes) -> tuple[int, dict[str, str]]:
    """Return the body's length (or `CHUNKED`) and the headers of a usual head; -1 for any other head."""
    lower = head.lower()
    lengths, codings = lower.count(_LENGTH), lower.count(_CODING)
    is_usual = head.startswith(b"HTTP/1.1 200 ") and lengths + codings == 1
    if not is_usual or _CONNECTION in lower or _CONTENT_CODING in lower:
        return -1, {}
    kind = _header(head, lower, _TYPE)
    headers = {} if kind is None else {"content-type": kind}
    if codings:
        return (CHUNKED, {**headers, "transfer-encoding": "chunked"}) if _CHUNKED in lower else (-1, {})
    length = _header(head, lower, _LENGTH) or ""
    return (int(length), {"content-length": length, **headers}) if length.isdecimal() else (-1, {})


def payload_start(data: bytes) -> int:
    """Return the offset of the payload if `data` is exactly one chunk that is not the last, else 0."""
    line = data.find(b"\r\n", 0, _LONGEST_LINE)
    length = _CHUNK_LENGTHS.get(data[:line])
    return line + 2 if length and length == len(data) - line - 4 and data.endswith(b"\r\n") else 0


def split_chunks(data: bytes) -> list[bytes] | None:
    """Return the payloads of `data`, empty for the chunk that ends the body; None unless all chunks are whole."""
    parts = data.split(b"\r\n")
    payloads = parts[1::2]
    lengths = list(map(len, payloads))
    if len(parts) % 2 == 0 or parts.pop() or list(map(_CHUNK_LENGTHS.get, parts[::2])) != lengths or 0 in lengths[:-1]:
        return None
    return payloads


def _header(head: bytes, lower: bytes, mark: bytes) -> str | None:
    """Return the value of the header that begins with `mark` in `lower`."""
    start = lower.find(mark) + len(mark)
    return head[start : head.find(b"\r", start)].strip(b" \t").decode("latin-1") if start >= len(mark) else None

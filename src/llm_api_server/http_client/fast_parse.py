"""Answers as engines usually write them: heads that repeat, frames that come whole. Pure.

What is not so is left to the parser of `upstream.py`.
"""

from __future__ import annotations

from functools import lru_cache

#: In the place of a length: the body comes in frames (RFC 9112, 7.1).
IN_FRAMES = -2
_LENGTH, _TYPE = b"\r\ncontent-length:", b"\r\ncontent-type:"
_CODING, _CONNECTION = b"\r\ntransfer-encoding:", b"\r\nconnection:"
_CHUNKED = _CODING + b" chunked\r\n"
#: By the first line of a frame. Longer frames, and other ways to write a length, are not ordinary.
_FRAME_LENGTHS = {b"%x" % length: length for length in range(1024)}
_LONGEST_LINE = 5


@lru_cache(256)
def read_head(head: bytes) -> tuple[int, dict[str, str]]:
    """Length (or `IN_FRAMES`) and headers of an answer with an ordinary head; -1 for all others."""
    lower = head.lower()
    lengths, codings = lower.count(_LENGTH), lower.count(_CODING)
    if not head.startswith(b"HTTP/1.1 200 ") or lengths + codings != 1 or _CONNECTION in lower:
        return -1, {}
    kind = _value(head, lower, _TYPE)
    headers = {} if kind is None else {"content-type": kind}
    if codings:
        return (IN_FRAMES, {**headers, "transfer-encoding": "chunked"}) if _CHUNKED in lower else (-1, {})
    length = _value(head, lower, _LENGTH) or ""
    return (int(length), {"content-length": length, **headers}) if length.isdecimal() else (-1, {})


def start_in_frame(data: bytes) -> int:
    """Where the payload of `data` begins, if that is one whole frame with one; else 0."""
    line = data.find(b"\r\n", 0, _LONGEST_LINE)
    length = _FRAME_LENGTHS.get(data[:line])
    return line + 2 if length and length == len(data) - line - 4 and data.endswith(b"\r\n") else 0


def whole_frames(data: bytes) -> list[bytes] | None:
    """What is in the frames of `data`; the last is empty where the body ends there. None: they are not all whole."""
    parts = data.split(b"\r\n")
    payloads = parts[1::2]
    lengths = list(map(len, payloads))
    if len(parts) % 2 == 0 or parts.pop() or list(map(_FRAME_LENGTHS.get, parts[::2])) != lengths or 0 in lengths[:-1]:
        return None
    return payloads


def _value(head: bytes, lower: bytes, mark: bytes) -> str | None:
    """Of the header that begins with `mark` in `lower`."""
    start = lower.find(mark) + len(mark)
    return head[start : head.find(b"\r", start)].strip(b" \t").decode("latin-1") if start >= len(mark) else None

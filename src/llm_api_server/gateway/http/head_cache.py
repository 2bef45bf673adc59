"""Recognition of a request head that repeats on its connection.

SDKs send the same head with every request of a connection, except for the length of the body. Such a request needs no
parser, and the request handler finds its earlier decisions on the head. `HttpProtocol.caches_heads` switches it off.
"""

from __future__ import annotations

import re

from llm_api_server.gateway.http.request_head import RequestHead

#: One line, digits only (RFC 9112, 2.2 and 6.3). Heads with several such lines are left to the parser.
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,15})[ \t]*\r\n", re.IGNORECASE)
_LENGTH_NAME = b"content-length"
_HEAD_END = b"\r\n\r\n"


class HeadCache:
    """Bytes of a request head before and after the value of its content-length."""

    __slots__ = ("_after", "_after_length", "_before", "_before_length", "head")

    def __init__(self, head: RequestHead, before: bytes, after: bytes) -> None:
        self.head = head
        self._before, self._before_length = before, len(before)
        self._after, self._after_length = after, len(after)

    @classmethod
    def learn(cls, head: RequestHead, data: bytes) -> HeadCache | None:
        """Return a cache for the head of `data`, the bytes of one complete request.

        None if more than the body's length decides how the request is framed.
        """
        end = data.find(_HEAD_END)
        length = _LENGTH.search(data, 0, end + 2)
        is_plain = head.keep_alive and head.can_chunk and not head.expects_continue
        if length is None or not is_plain or b"transfer-encoding" in head.headers:
            return None
        if len(data) != end + len(_HEAD_END) + int(length[1]):
            return None
        if sum(name == _LENGTH_NAME for name, _ in head.raw) != 1:
            return None
        return cls(head, data[: length.start(1)], data[length.end(1) : end + len(_HEAD_END)])

    def body_of(self, data: bytes) -> bytes | None:
        """Return the body if `data` is this head and one complete body, nothing else."""
        if not data.startswith(self._before):
            return None
        start = self._before_length
        end = data.find(b"\r", start, start + 16)
        if end < 0 or not data.startswith(self._after, end):
            return None
        digits, body = data[start:end], data[end + self._after_length :]
        return body if digits.isdigit() and int(digits) == len(body) else None

"""The head of a request to an engine endpoint: read once, and kept while a connection repeats it.

Clients that keep a connection send the same head with every request but for the length of the body. `HeadCache` knows
the bytes of the last one, so that the next needs no parser, and no look at its key.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llm_api_server.auth.access import Key
from llm_api_server.auth.authenticator import KnownCaller
from llm_api_server.errors import InvalidRequest, PermissionDenied
from llm_api_server.gateway.wire.endpoints import Endpoint

if TYPE_CHECKING:
    from llm_api_server.gateway.proxy.engine_request import ResolvedModel

#: RFC 9112, 2.2 and 6.3: one line, digits only. Heads that repeat it are left to the parser.
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,15})[ \t]*\r\n", re.IGNORECASE)
_LENGTH_NAME = b"content-length"
_HEAD_END = b"\r\n\r\n"


class RequestHead:
    """`headers` have lower-case names; of several with the same name it has the last, `raw` all."""

    __slots__ = (
        "allowed", "can_chunk", "changes", "endpoint", "expects_continue", "headers", "keep_alive", "known", "raw",
        "routes",
    )  # fmt: skip

    def __init__(
        self,
        endpoint: Endpoint,
        raw: Sequence[tuple[bytes, bytes]],
        *,
        keep_alive: bool = True,
        can_chunk: bool = True,
        expects_continue: bool = False,
    ) -> None:
        self.endpoint = endpoint
        self.raw = raw
        self.headers = dict(raw)
        self.keep_alive = keep_alive
        self.can_chunk = can_chunk
        self.expects_continue = expects_continue
        #: Who sent it, and of which number of the authenticator's changes that is true.
        self.known: KnownCaller | None = None
        self.changes = -1
        #: The key that may do what this head wants.
        self.allowed: Key | None = None
        #: Where requests with this head go, by the model that they name.
        self.routes: dict[str | None, ResolvedModel] = {}

    def check(self, key: Key | None) -> None:
        """Whether the key may do what this head wants. Raises `ApiError`."""
        endpoint = self.endpoint
        if key is None or not key.may(endpoint.permission):
            raise PermissionDenied(f"Your key has no permission for {endpoint.path} ('{endpoint.permission}').")
        if self.headers.get(b"content-encoding", b"identity") != b"identity":
            raise InvalidRequest("Compressed request bodies are not accepted; send the body as it is.")
        self.allowed = key

    def get(self, name: bytes, otherwise: str = "") -> str:
        value = self.headers.get(name)
        return otherwise if value is None else value.decode("latin-1")


def lines_of(headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Headers as they stand in a head."""
    return b"".join([b"%b: %b\r\n" % header for header in headers])


def headers_of(lines: bytes) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, _, value in (line.partition(b": ") for line in lines.split(b"\r\n") if line)]


class HeadCache:
    """The bytes of a head around the length of its body."""

    __slots__ = ("_after", "_after_length", "_before", "_before_length", "head")

    def __init__(self, head: RequestHead, before: bytes, after: bytes) -> None:
        self.head = head
        self._before, self._before_length = before, len(before)
        self._after, self._after_length = after, len(after)

    @classmethod
    def learn(cls, head: RequestHead, data: bytes) -> HeadCache | None:
        """From the bytes of one whole request; None where more than the length decides how it is read."""
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
        """The body, where `data` is this head again with the whole of a body and nothing else."""
        if not data.startswith(self._before):
            return None
        place = self._before_length
        end = data.find(b"\r", place, place + 16)
        if end < 0 or not data.startswith(self._after, end):
            return None
        digits, body = data[place:end], data[end + self._after_length :]
        return body if digits.isdigit() and int(digits) == len(body) else None

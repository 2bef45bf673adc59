"""Head of a request that bypasses ASGI."""

from __future__ import annotations

from typing import Any

from llm_api_server.gateway.http.header_lines import Headers


class RequestHead:
    """Path, headers and framing of a request.

    `headers` maps lower-case names to values, of a repeated name to the last; `raw` has all.
    """

    __slots__ = ("cached", "can_chunk", "expects_continue", "headers", "keep_alive", "path", "raw")

    def __init__(
        self,
        path: str,
        raw: Headers,
        *,
        keep_alive: bool = True,
        can_chunk: bool = True,
        expects_continue: bool = False,
    ) -> None:
        self.path = path
        self.raw = raw
        self.headers = dict(raw)
        self.keep_alive = keep_alive
        self.can_chunk = can_chunk
        self.expects_continue = expects_continue
        #: Results that the request handler keeps for the next request with this head. Opaque to the HTTP side.
        self.cached: Any = None

    def get(self, name: bytes, default: str = "") -> str:
        """Return the value of a header as text (Latin-1)."""
        value = self.headers.get(name)
        return default if value is None else value.decode("latin-1")

"""Contracts between a connection, the handler of its requests and the response to each.

The handler knows models, keys and usage; this package does not. A handler writes a response without waiting; its
listener learns when the client reads more slowly than that, and when it disconnects.
"""

from __future__ import annotations

from typing import Protocol

from llm_api_server.event_loop.write_buffer import WriteBuffer
from llm_api_server.gateway.http.header_lines import CachedLines, Headers
from llm_api_server.gateway.http.request_head import RequestHead

#: Key of the `RequestHandler` in the state of the app's lifespan.
REQUEST_HANDLER = "llm_api_server.request_handler"
#: Seconds that a client which has stopped reading gets for the last bytes.
LAST_WRITE_TIMEOUT = 1.0


class ClientDisconnected(Exception):
    """The client closed its connection."""


class RequestListener(Protocol):
    """A request being handled, as its connection sees it."""

    def register(self) -> None:
        """Apply deadline and shutdown from now on: the earlier requests of the connection have their responses."""

    def begin(self) -> None:
        """Start handling. The body, or enough to begin with, has arrived."""

    def on_blocked(self) -> None:
        """Handle a client that reads more slowly than data is written."""

    def on_writable(self) -> None:
        """Handle a client that has read what was written."""

    def on_disconnect(self) -> None:
        """Handle the end of the client's connection."""

    def on_shutdown(self) -> None:
        """End the response now: the server stops."""


class Responder(Protocol):
    """Body of a request and response to it: `start`, any number of `write` or `send`, then `end` or `abort`.

    Nothing but `wait_body` waits. Written data leaves with `flush`, `send`, `end` or `abort`.
    """

    @property
    def address(self) -> str | None:
        """Network address of the client."""

    @property
    def is_writable(self) -> bool: ...

    @property
    def is_chunked(self) -> bool:
        """True once the response has begun in chunks (RFC 9112, 7.1), so that `forward` may be used."""

    @property
    def has_body(self) -> bool:
        """True once the whole body has arrived, or is known to be too large."""

    async def wait_body(self) -> None:
        """Wait until `has_body`. Raises `BodyTimeout` if the body makes no progress; the connection closes then."""

    def take_body(self) -> bytes:
        """Return the body, once. Raises `RequestTooLarge`."""

    def start(self, status: int, lines: bytes) -> None:
        """Begin the response; `lines` are its header lines without those of the framing."""

    def write(self, data: bytes) -> None: ...

    def send(self, data: bytes) -> None:
        """Write and flush."""

    def forward(self, chunks: bytes) -> None:
        """Send data that is in chunks already."""

    def end(self) -> None: ...

    def flush(self) -> None: ...

    def abort(self) -> None:
        """Leave the response without an end, so that the client sees that it is incomplete."""

    def abort_if_stalled(self) -> None:
        """Close the connection if the client does not read the last bytes within `LAST_WRITE_TIMEOUT`."""

    def close(self) -> None:
        """Release the responder: the listener has finished."""


class RequestHandler(Protocol):
    """Handler of the requests of a worker that bypass ASGI."""

    #: Header lines that the server adds to every response.
    default_lines: CachedLines
    #: Buffer that connections to clients write through.
    write_buffer: WriteBuffer
    max_body_bytes: int
    #: Seconds that a body may make no progress.
    body_timeout: float

    def accepts(self, path: bytes, headers: Headers) -> bool:
        """Return whether a `POST` to `path` is handled here and needs no middleware."""

    def open(self, head: RequestHead, responder: Responder) -> RequestListener:
        """Return the listener of a new request. It is not registered and has not begun."""

    def client_address(self, peer: str | None, headers: Headers) -> str | None:
        """Return the address of the client; a trusted proxy may have forwarded it."""

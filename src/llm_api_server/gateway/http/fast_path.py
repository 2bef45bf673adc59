"""uvicorn's HTTP protocol with a way past ASGI, and limits on the head of a request.

`POST` requests that the `RequestHandler` of the app's lifespan accepts get a `DirectResponder` instead of uvicorn's
request cycle; all others go the usual way. uvicorn's httptools protocol limits neither the size of a head nor the time
it takes: one connection without a key could fill the memory.

Offers of another protocol (`Upgrade`) are ignored, as RFC 9110, 7.8, allows. The parser would end the request at its
head, so it gets the head once more without the offer.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar, cast

from httptools import HttpParserError, HttpParserUpgrade
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from llm_api_server.event_loop.write_buffer import BufferedTransport
from llm_api_server.gateway.http.direct import DirectResponder
from llm_api_server.gateway.http.head_cache import HeadCache
from llm_api_server.gateway.http.request_head import RequestHead
from llm_api_server.gateway.http.responder import REQUEST_HANDLER, RequestHandler

#: Limit on request line and headers together. Checked after each read, so a head may exceed it by one read.
MAX_HEAD_BYTES = 256 * 1024
#: Seconds that a stopping worker waits for the first request of a connection it has accepted.
LAST_REQUEST_TIMEOUT = 1.0
#: Headers that offer another protocol, which are also options of `Connection` (RFC 9110, 7.8; RFC 7540, 3.2.1).
_OFFERS = frozenset({b"upgrade", b"http2-settings"})


class HttpProtocol(HttpToolsProtocol):
    """Connection to a client.

    Responds 400 and closes if a head does not end within `MAX_HEAD_BYTES`, and closes if no complete head arrives
    within the keep-alive timeout.
    """

    #: Switch for tests: whether a repeated head is recognised by its bytes instead of parsed.
    caches_heads: ClassVar[bool] = True

    cycle: Any  # uvicorn's request cycle or a `DirectResponder`

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_in_head = True
        self._is_between_requests = True
        self._head_bytes = 0
        self._head_cache: HeadCache | None = None
        self._idle_since = 0.0
        self._idle_timer: asyncio.TimerHandle | None = None
        self._is_draining = False
        #: Whether the head that is being parsed offers another protocol, and is to be parsed again without that.
        self._has_offer = False
        self._handler: RequestHandler | None = self.app_state.get(REQUEST_HANDLER)
        self._buffered: BufferedTransport | None = None
        #: Responder of the request in progress, unless that goes through ASGI.
        self._active: DirectResponder | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # uvicorn's signature
        if self._handler is not None:
            transport = self._buffered = self._handler.write_buffer.wrap(transport)
        super().connection_made(transport)
        self._idle_since = self.loop.time()
        self._idle_timer = self.loop.call_later(self.timeout_keep_alive, self._close_if_idle)

    # From the transport.

    def data_received(self, data: bytes) -> None:
        previous = self.cycle
        is_next = self._is_between_requests and (previous is None or previous.response_complete)
        cache = self._head_cache
        if is_next and cache is not None and (body := cache.body_of(data)) is not None:
            if self.timeout_keep_alive_task is not None:
                self._unset_keepalive_if_required()
            handler, head = self._handler, cache.head
            assert handler is not None, "a head is cached from a request that it accepted"
            responder = DirectResponder(self, handler, head)
            self.cycle = self._active = responder
            responder.listener = handler.open(head, responder)
            responder.begin_with(body)
            return
        self._head_bytes += len(data)
        self._parse(data)
        current = self.cycle
        is_whole = is_next and self._is_between_requests and current is not previous
        if is_whole and isinstance(current, DirectResponder) and self.caches_heads:
            self._head_cache = HeadCache.learn(current.head, data)
        elif not self._is_between_requests and isinstance(current, DirectResponder):
            current.on_body_pending()
        if self._is_in_head and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The headers of your request are too long.")

    def _parse(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        while data:
            try:
                self.parser.feed_data(data)
                data = b""
            except HttpParserUpgrade as offer:
                # Without an offer it is a `CONNECT`, which no tunnel follows.
                data = self._head_without_offer() + data[offer.args[0] :] if self._has_offer else b""
            except HttpParserError:
                self.send_400_response("Invalid HTTP request received.")
                data = b""

    def _head_without_offer(self) -> bytes:
        """Return the head that was just parsed, without what offers another protocol."""
        self._has_offer = False
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            if name == b"connection":
                options = [option.strip() for option in value.split(b",")]
                value = b", ".join(option for option in options if option.lower() not in _OFFERS)  # noqa: PLW2901
            if value and name not in _OFFERS:
                lines.append(b"%b: %b" % (name, value))
        return b"\r\n".join([*lines, b"", b""])

    def eof_received(self) -> None:
        """Flush: the event loop closes the transport after this, not only the half that the client has closed."""
        if self._buffered is not None:
            self._buffered.flush()

    def shutdown(self) -> None:
        """Close the connection once it is idle or has its response.

        A connection that was just accepted, or whose request is arriving, is not idle: its client could not know that
        the request was never read.
        """
        self._is_draining = True
        self._head_cache = None
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
        elif self.cycle is not None and self._is_between_requests:
            self.transport.close()
        else:
            self.loop.call_later(LAST_REQUEST_TIMEOUT, self._close_if_unused)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        if self._active is not None:
            self._active.on_disconnect()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._active is not None:
            self._active.listener.on_blocked()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._active is not None:
            self._active.listener.on_writable()

    # From the parser.

    def on_message_begin(self) -> None:
        self._is_between_requests = False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        method = self.parser.get_method()
        if self.parser.should_upgrade() and method != b"CONNECT":
            self._has_offer = True
            return
        self._is_in_head = False
        handler = self._handler
        if method == b"POST" and handler is not None and handler.accepts(self.url, self.headers):
            self._open(handler)
            return
        super().on_headers_complete()
        if self.cycle is not None and (self._is_draining or method == b"CONNECT"):
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        if isinstance(self.cycle, DirectResponder):
            self.cycle.on_body(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._has_offer:
            return
        self._is_in_head = self._is_between_requests = True
        self._head_bytes = 0
        if isinstance(self.cycle, DirectResponder):
            self.cycle.on_body_complete()
        else:
            super().on_message_complete()

    def _open(self, handler: RequestHandler) -> None:
        previous = self.cycle
        can_chunk = self.parser.get_http_version() != "1.0"
        head = RequestHead(
            self.url.decode("ascii"),
            self.headers,
            keep_alive=can_chunk and not self._is_draining and self.parser.should_keep_alive(),
            can_chunk=can_chunk,
            expects_continue=self.expect_100_continue,
        )
        responder = self.cycle = DirectResponder(self, handler, head)
        responder.listener = handler.open(head, responder)
        responder.on_head()
        if previous is None or previous.response_complete:
            self._active = responder
            responder.on_turn()
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((cast("Any", responder), self.app))

    # The end of a response.

    def on_responder_closed(self, responder: DirectResponder) -> None:
        self._active = None
        if not responder.keep_alive:
            self.transport.close()
        if responder.disconnected:
            return
        if self.pipeline or self.transport.is_closing():
            self.on_response_complete()
            return
        # What `on_response_complete` does, without a timer for each request.
        self.server_state.total_requests += 1
        self._begin_idling()

    def on_response_complete(self) -> None:
        self._begin_idling()
        super().on_response_complete()

    def _begin_idling(self) -> None:
        self._idle_since = self.loop.time()
        if self._idle_timer is None:
            self._idle_timer = self.loop.call_later(self.timeout_keep_alive, self._close_if_idle)

    def _close_if_idle(self) -> None:
        self._idle_timer = None
        if self.transport.is_closing() or self._active is not None:
            return
        left = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left > 0:
            self._idle_timer = self.loop.call_later(left, self._close_if_idle)
        else:
            self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        """Start a request, perhaps one that had to wait for the one before it."""
        if isinstance(cycle, DirectResponder):
            self._active = cycle
            # In an iteration of its own: a series of requests that fail immediately would make a deep stack.
            self.loop.call_soon(cycle.on_turn)
        else:
            self._active = None
            super()._start_asgi_task(cycle, app)

"""uvicorn's HTTP protocol with a way past ASGI for requests of engine endpoints, and a limit on the head of a request.

Used by `serving.py` and `gunicorn_worker.py`. uvicorn's httptools protocol has no such limit: before any key is
checked, one connection could fill the memory with a header.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from llm_api_server.event_loop.write_buffer import BufferedTransport
from llm_api_server.gateway.http.request_head import HeadCache, RequestHead
from llm_api_server.gateway.http.responder import FAREWELL_TIMEOUT, too_large
from llm_api_server.gateway.middleware import answer_lines, finish
from llm_api_server.gateway.proxy.services import FAST_PATH, FastPathHandler
from llm_api_server.gateway.wire.endpoints import Endpoint

#: Request line and headers together. Checked per read, so that some more may arrive.
MAX_HEAD_BYTES = 256 * 1024
#: A body that is not here with its head is waited for up to this size before anybody looks who sends it.
_MAX_BLIND_BYTES = 64 * 1024
#: Seconds that a worker about to end waits for the request of a client it has let in.
LAST_REQUEST_TIMEOUT = 1.0


class HttpProtocol(HttpToolsProtocol):
    """Answers 400 and closes when a head does not end within `MAX_HEAD_BYTES`."""

    cycle: Any  # uvicorn's own, or a `DirectResponder`

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_in_head = True
        self._is_between = True
        self._head_bytes = 0
        self._last: HeadCache | None = None
        self._idle_since = 0.0
        self._idle_timer: asyncio.TimerHandle | None = None
        self._is_draining = False
        self._door: FastPathHandler | None = self.app_state.get(FAST_PATH)
        self._late: BufferedTransport | None = None
        #: The request being answered, where that goes past ASGI.
        self._active: DirectResponder | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        """Who sends no whole head for as long as an idle connection may last is sent away."""
        if self._door is not None:
            transport = self._late = self._door.turns.wrap(transport)
        super().connection_made(transport)
        self._idle_since = self.loop.time()
        self._idle_timer = self.loop.call_later(self.timeout_keep_alive, self._close_if_idle)

    # ── from the transport ──

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        is_first = self._is_between and (before is None or before.response_complete)
        if is_first and self._last is not None and (body := self._last.body_of(data)) is not None:
            if self.timeout_keep_alive_task is not None:
                self._unset_keepalive_if_required()
            self._repeat(self._last.head, body)
            return
        self._head_bytes += len(data)
        super().data_received(data)
        client = self.cycle
        if is_first and self._is_between and isinstance(client, DirectResponder) and client is not before:
            self._last = HeadCache.learn(client.head, data)
        if self._is_in_head and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The headers of your request are too long.")

    def eof_received(self) -> None:
        """The transport closes itself after this, and not only the half that the client has closed."""
        if self._late is not None:
            self._late.flush()

    def shutdown(self) -> None:
        """The worker ends: this connection goes when it is idle or has had its answer.

        One that was just let in, and one whose request is arriving, are not idle: their clients could not know that
        the request was never read.
        """
        self._is_draining = True
        self._last = None
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
        elif self.cycle is not None and self._is_between:
            self.transport.close()
        else:
            self.loop.call_later(LAST_REQUEST_TIMEOUT, self._close_if_unasked)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        if self._active is not None:
            self._active.on_gone()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._active is not None:
            self._active.exchange.on_blocked()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._active is not None:
            self._active.exchange.on_writable()

    # ── from the parser ──

    def on_message_begin(self) -> None:
        self._is_between = False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        door = self._door
        if door is not None and self.parser.get_method() == b"POST" and not self.parser.should_upgrade():
            endpoint = door.endpoints.get(self.url)
            if endpoint is not None and door.takes(self.headers):
                self._open(door, endpoint)
                return
        super().on_headers_complete()
        if self._is_draining and self.cycle is not None:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        if isinstance(self.cycle, DirectResponder):
            self.cycle.on_body(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_in_head = self._is_between = True
        self._head_bytes = 0
        if isinstance(self.cycle, DirectResponder):
            self.cycle.on_body_complete()
        else:
            super().on_message_complete()

    def _open(self, door: FastPathHandler, endpoint: Endpoint) -> None:
        before = self.cycle
        can_chunk = self.parser.get_http_version() != "1.0"
        head = RequestHead(
            endpoint,
            self.headers,
            keep_alive=can_chunk and not self._is_draining and self.parser.should_keep_alive(),
            can_chunk=can_chunk,
            expects_continue=self.expect_100_continue,
        )
        client = self.cycle = DirectResponder(self, door, head)
        client.look_at(head)
        if before is None or before.response_complete:
            self._active = client
            client.on_turn()
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((cast("Any", client), self.app))

    def _repeat(self, head: RequestHead, body: bytes) -> None:
        """A request whose head is known, and whose body is here."""
        assert self._door is not None
        client = self.cycle = self._active = DirectResponder(self, self._door, head)
        client.begin_with(body)

    def on_answered(self) -> None:
        """As `on_response_complete`, without a timer of its own for each request."""
        if self.pipeline or self.transport.is_closing():
            self.on_response_complete()
            return
        self.server_state.total_requests += 1
        self._idle_since = self.loop.time()
        if self._idle_timer is None:
            self._idle_timer = self.loop.call_later(self.timeout_keep_alive, self._close_if_idle)

    def on_response_complete(self) -> None:
        self._idle_since = self.loop.time()
        super().on_response_complete()

    def _close_if_idle(self) -> None:
        self._idle_timer = None
        if self.transport.is_closing() or self._active is not None:
            return
        left = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left > 0:
            self._idle_timer = self.loop.call_later(left, self._close_if_idle)
        elif self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def _close_if_unasked(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        """uvicorn's way to start a request, those that had to wait for the one before among them."""
        if isinstance(cycle, DirectResponder):
            self._active = cycle
            # In a turn of its own: a row of requests that fail at once would else be a deep stack.
            self.loop.call_soon(cycle.on_turn)
        else:
            self._active = None
            super()._start_asgi_task(cycle, app)


class DirectResponder:
    """The client's end of a request on uvicorn's transport, in the place of uvicorn's own cycle.

    Its first attributes are those that uvicorn's protocol uses.
    """

    response_complete = False
    disconnected = False

    _is_too_large = False
    _size = 0
    _has_body = False
    _has_turn = False
    _is_early = False
    _has_begun = False
    _waiter: asyncio.Future[None] | None = None
    takes_frames = False

    def __init__(self, protocol: HttpProtocol, door: FastPathHandler, head: RequestHead) -> None:
        self.keep_alive = head.keep_alive
        self.message_event = _NOTHING
        self.head = head
        self._protocol = protocol
        self._door = door
        self._transport = protocol.transport
        self._chunks: list[bytes] = []
        self._out: list[bytes] = []
        self.exchange, self._record = door.open(head, self)

    # ── from the protocol ──

    def begin_with(self, body: bytes) -> None:
        """All of it is here, and it is its turn."""
        self._has_turn = self._has_body = self._has_begun = True
        self._is_too_large = len(body) > self._door.proxy.max_body_bytes
        self._chunks.append(body)
        self.exchange.arrive()
        self.exchange.begin()

    def on_turn(self) -> None:
        """All requests before it on this connection are answered."""
        if self.disconnected:
            return
        self._has_turn = True
        self.exchange.arrive()
        self._begin_if_ready()

    def look_at(self, head: RequestHead) -> None:
        """Whether an answer need not wait for the body."""
        length = head.headers.get(b"content-length", b"")
        self._is_too_large = length.isdigit() and int(length) > self._door.proxy.max_body_bytes
        self._is_early = self._is_too_large or head.expects_continue

    def on_body(self, data: bytes) -> None:
        if self.response_complete or self._is_too_large:
            return
        self._chunks.append(data)
        self._size += len(data)
        if self._size > self._door.proxy.max_body_bytes:
            self._is_too_large = True
            self._chunks.clear()
            self._wake()
        if self._size > _MAX_BLIND_BYTES:
            self._is_early = True
            self._begin_if_ready()

    def on_body_complete(self) -> None:
        self._has_body = True
        self._wake()
        self._begin_if_ready()

    def on_gone(self) -> None:
        self.disconnected = True
        self._has_begun = True  # or never will
        if not self.response_complete:
            self.exchange.on_gone()

    def _begin_if_ready(self) -> None:
        if self._has_turn and not self._has_begun and (self._has_body or self._is_early):
            self._has_begun = True
            self.exchange.begin()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # ── for the exchange ──

    @property
    def address(self) -> str | None:
        peer = self._protocol.client
        return self._door.address(peer[0] if peer else None, self.head.raw)

    @property
    def is_writable(self) -> bool:
        return not self._protocol.flow.write_paused

    def body_at_once(self) -> bytes | None:
        if self._is_too_large or not self._has_body:
            return None
        chunks, self._chunks = self._chunks, []
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def body(self) -> bytes:
        if not self._has_body and not self._is_too_large:
            if self.head.expects_continue:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._is_too_large:
            raise too_large(self._door.proxy.max_body_bytes)
        return self.body_at_once() or b""

    def start(self, status: int, lines: bytes) -> None:
        door = self._door
        # uvicorn's own headers change once a second.
        out = [STATUS_LINE[status], door.lines_of(self._protocol.server_state.default_headers), lines]
        out.append(answer_lines(self._record))
        if lines.find(b"content-length: ") < 0:
            if self.head.can_chunk:
                self.takes_frames = True
                out.append(b"transfer-encoding: chunked\r\n")
            else:
                self.keep_alive = False
        if not self.keep_alive:
            out.append(b"connection: close\r\n")
        out.append(b"\r\n")
        self._out = out

    def write(self, data: bytes) -> None:
        if self.takes_frames:
            self._out += (b"%x\r\n" % len(data), data, b"\r\n")
        else:
            self._out.append(data)

    def send(self, data: bytes) -> None:
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self.takes_frames else data)

    def forward(self, frames: bytes) -> None:
        self._transport.write(frames)

    def end(self) -> None:
        if self.takes_frames:
            self._out.append(b"0\r\n\r\n")
        self.response_complete = True
        if not self.disconnected:
            self._transport.write(b"".join(self._out))
        self._out = []

    def flush(self) -> None:
        out, self._out = self._out, []
        if out and not self.disconnected:
            self._transport.write(b"".join(out))

    def abort(self) -> None:
        self.keep_alive = False
        self.response_complete = True
        self.flush()

    def hurry(self) -> None:
        self._protocol.loop.call_later(FAREWELL_TIMEOUT, self._abort_if_blocked)

    def over(self) -> None:
        self.response_complete = True
        finish(self._record, self._door.proxy.accounts, self._door.proxy.log)
        del self.exchange  # each knows the other: the garbage collector would have to find them
        protocol = self._protocol
        protocol._active = None  # noqa: SLF001 - the two are one mechanism
        if not self.keep_alive:
            self._transport.close()
        if not self.disconnected:
            protocol.on_answered()

    def _abort_if_blocked(self) -> None:
        if not self.is_writable and not self._transport.is_closing():
            self._transport.abort()


class _Nothing:
    """In the place of an event that nobody waits for."""

    def set(self) -> None:
        pass


_NOTHING = _Nothing()

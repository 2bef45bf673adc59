"""The worker's connection to the manager: connects, starts a manager if none serves, and reconnects after a loss.

Runs on the worker's loop for the life of the app. Running requests never notice a loss of the connection; calls that
may be repeated are sent again. Leases, keys, quota and usage register the messages that they handle.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Mapping
from typing import Any, cast

from loguru import logger

from llm_api_server.config.models import Config
from llm_api_server.errors import ApiError, ControlError, EngineUnavailable, ShuttingDown, error_from_code
from llm_api_server.ipc import messages
from llm_api_server.ipc.framing import encode
from llm_api_server.ipc.run_dir import RunDir
from llm_api_server.lifecycle.config_handover import pack

CONNECT_RETRY_INTERVAL = 0.05
#: Seconds that calls wait for a manager that does not respond.
CONNECT_TIMEOUT = 15.0
#: Seconds until another try after a manager that ended without serving: it lost the race for the lock.
SPAWN_INTERVAL = 2.0
_UNREACHABLE = "The model manager does not respond; try again in a moment."

Handlers = Mapping[type, Callable[[Any], None]]


class ManagerProcess:
    """Starts the manager with the configuration of this worker. The manager's lock ensures that only one serves."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = float("-inf")

    def ensure_started(self, now: float) -> None:
        """Start a manager unless this worker's own is running or was started within `SPAWN_INTERVAL`."""
        if self._is_running() or now - self._started_at < SPAWN_INTERVAL:
            return
        self._started_at = now
        argv = [sys.executable, "-m", "llm_api_server.manager.main", "--applied", "--config", str(self.config.source)]
        # An unnamed file, for a configuration may be longer than a pipe holds. Output is inherited, so that the
        # terminal of the server shows models load.
        with tempfile.TemporaryFile(dir=self.config.run_dir) as given:
            given.write(pack(self.config).encode())
            given.seek(0)
            self._process = subprocess.Popen(argv, stdin=given, start_new_session=True)
        logger.info("started the manager (pid {})", self._process.pid)

    def _is_running(self) -> bool:
        """Return whether the process runs, and reap it if it has ended."""
        if self._process is None:
            return False
        code = self._process.poll()
        if code is None:
            return True
        self._process = None
        if code != 0:
            logger.error("the manager ended with exit code {}; its own messages are above or in manager.log", code)
        return False


class _PendingCall:
    """A call without a response yet. Commands do not repeat: the old manager may have begun to carry them out."""

    __slots__ = ("is_sent", "message", "repeats", "response")

    def __init__(self, message: Any, *, repeats: bool) -> None:
        self.message = message
        self.repeats = repeats
        self.is_sent = False
        self.response: asyncio.Future[Any] = asyncio.get_running_loop().create_future()


class ManagerLink:
    """Connection of this worker, at most one at a time. `worker` identifies the worker for its whole life."""

    def __init__(
        self,
        run_dir: RunDir,
        start_manager: Callable[[float], None],
        connect_timeout: float = CONNECT_TIMEOUT,
    ) -> None:
        self.worker = uuid.uuid4().hex
        self.numbers = itertools.count(1)
        self.is_closing = False
        self._run_dir = run_dir
        self._start_manager = start_manager
        self._connect_timeout = connect_timeout
        self._calls: dict[int, _PendingCall] = {}
        self._handlers: dict[type, Callable[[Any], None]] = {}
        self._on_connect: list[Callable[[messages.Hello], None]] = []
        self._on_connected: list[Callable[[], None]] = []
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None
        self._out: list[bytes] = []

    def register(
        self,
        handlers: Handlers,
        *,
        on_connect: Callable[[messages.Hello], None] | None = None,
        on_connected: Callable[[], None] | None = None,
    ) -> None:
        """Register handlers of the manager's messages, by type.

        `on_connect` adds to the first message of a new connection; `on_connected` sends what must come after it.
        """
        self._handlers.update(handlers)
        if on_connect is not None:
            self._on_connect.append(on_connect)
        if on_connected is not None:
            self._on_connected.append(on_connected)

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="control connection")

    async def close(self) -> None:
        """Refuse pending calls and disconnect; the manager goes on."""
        self.is_closing = True
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._refuse(ShuttingDown("This server is shutting down."))

    @property
    def is_connected(self) -> bool:
        return self._transport is not None

    def next_number(self) -> int:
        """Return a new number for the field `request` of a call."""
        return next(self.numbers)

    async def call(self, message: Any, *, repeats: bool = True) -> Any:
        """Send a message with a `request` and return the manager's response. Raises its refusal as an `ApiError`.

        Without a connection the call waits for one. After a loss it is sent again if it `repeats`, else refused.
        """
        if self.is_closing:
            raise ShuttingDown("This server is shutting down.")
        call = self._calls[message.request] = _PendingCall(message, repeats=repeats)
        call.is_sent = self._transport is not None
        self.send(message)
        try:
            return await call.response
        finally:
            del self._calls[message.request]

    def send(self, message: messages.ToManager) -> None:
        """Send a message. Dropped without a connection: `on_connect` announces all that still holds in the next one."""
        if self._transport is None:
            return
        if not self._out:
            asyncio.get_running_loop().call_soon(self._write)
        self._out.append(encode(message))

    def _write(self) -> None:
        """Write all messages of this loop iteration at once."""
        out, self._out = self._out, []
        if self._transport is not None and out:
            self._transport.write(b"".join(out))

    def on_message(self, message: messages.ToClient) -> None:
        call = self._calls.get(getattr(message, "request", 0))
        if call is not None and not call.response.done():
            if isinstance(message, messages.Refused):
                call.response.set_exception(_error(message))
            else:
                call.response.set_result(message)
        handler = self._handlers.get(type(message))
        if handler is not None:
            handler(message)

    async def _run(self) -> None:
        """Keep one connection to a manager until cancelled."""
        try:
            while True:
                transport, protocol = await self._connect()
                self._start_session(transport)
                await protocol.lost
                self._on_lost()
        finally:
            self._write()
            if self._transport is not None:
                self._transport.close()
                self._transport = None

    async def _connect(self) -> tuple[asyncio.Transport, _Protocol]:
        loop = asyncio.get_running_loop()
        path = str(self._run_dir.socket)
        give_up_at = loop.time() + self._connect_timeout
        while True:
            try:
                return await loop.create_unix_connection(lambda: _Protocol(self), path)
            except OSError:
                self._try_to_start(loop.time())
            if loop.time() > give_up_at:
                logger.error("no manager responds at {}", path)
                self._refuse(EngineUnavailable(_UNREACHABLE, retry_after=1))
                give_up_at = loop.time() + self._connect_timeout
            await asyncio.sleep(CONNECT_RETRY_INTERVAL)

    def _try_to_start(self, now: float) -> None:
        try:
            self._start_manager(now)
        except OSError as error:
            logger.error("cannot start the manager: {}", error)

    def _start_session(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._out.clear()
        hello = messages.Hello(os.getpid(), worker=self.worker)
        for add_to in self._on_connect:
            add_to(hello)
        self.send(hello)
        for call in list(self._calls.values()):
            call.is_sent = True
            self.send(call.message)
        for resend in self._on_connected:
            resend()

    def _on_lost(self) -> None:
        self._transport = None
        logger.warning("lost the connection to the manager")
        self._refuse(EngineUnavailable(_UNREACHABLE, retry_after=1), commands_only=True)

    def _refuse(self, error: ApiError, *, commands_only: bool = False) -> None:
        for call in list(self._calls.values()):
            is_meant = not commands_only or (call.is_sent and not call.repeats)
            if is_meant and not call.response.done():
                call.response.set_exception(error)


def _error(refused: messages.Refused) -> ApiError:
    error = error_from_code(
        refused.code, refused.message, retry_after=refused.retry_after, should_retry=refused.should_retry
    )
    error.rate_limits = refused.rate_limits
    error.position = refused.position
    return error


class _Protocol(asyncio.Protocol):
    """Decodes the manager's messages. `lost` is done when the connection is gone."""

    def __init__(self, link: ManagerLink) -> None:
        self._link = link
        self._decoder = messages.to_client_decoder()
        self._transport: asyncio.Transport | None = None
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._decoder.feed(data):
                self._link.on_message(message)
        except ControlError as error:
            logger.error("control connection closed: {}", error)
            if self._transport is not None:
                self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        if not self.lost.done():
            self.lost.set_result(None)

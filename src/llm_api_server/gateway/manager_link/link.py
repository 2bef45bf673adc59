"""The worker's connection to the manager: finds it or starts it, and after a loss connects again.

Built by `create_app`, run for the life of the app on the worker's event loop. What goes over it is the business of its
parts: leases (`leases.py`), keys (`store_keys.py`), limits and usage (`accounts.py`). Requests under way never notice a
loss; questions are asked anew.
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
from collections.abc import Callable
from typing import Any, Protocol, cast

from loguru import logger

from llm_api_server.config.models import Config
from llm_api_server.errors import ApiError, ControlError, EngineUnavailable, ShuttingDown, error_from_code
from llm_api_server.ipc import messages
from llm_api_server.ipc.framing import encode
from llm_api_server.ipc.run_dir import RunDir
from llm_api_server.lifecycle.config_handover import pack

CONNECT_RETRY_INTERVAL = 0.05
#: How long questions wait for a manager that does not answer.
CONNECT_TIMEOUT = 15.0
#: A manager that ended without serving (it lost the race to be the one) is followed by another try after this.
SPAWN_INTERVAL = 2.0
_UNREACHABLE = "The model manager does not answer; try again in a moment."


class Part(Protocol):
    """What uses the link. The manager's messages that answer no question go to `handlers` by their type."""

    handlers: dict[type, Callable[[Any], None]]

    def greet(self, hello: messages.Hello) -> None:
        """A new connection is about to be used: add to its first message what must survive the old one."""

    def connected(self) -> None:
        """The first message is sent; say what else is to be said again."""


class ManagerProcess:
    """Starts the manager, with the configuration that its worker has. The manager's own lock sees to it that only one
    serves.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = float("-inf")

    def ensure_started(self, now: float) -> None:
        """Start one unless one that this worker started still runs or was started a moment ago."""
        if self._is_running() or now - self._started_at < SPAWN_INTERVAL:
            return
        self._started_at = now
        argv = [sys.executable, "-m", "llm_api_server.manager.main", "--applied", "--config", str(self.config.source)]
        # A file without a name also takes what no pipe holds. Output goes where ours goes: whoever watches the server
        # sees models load.
        with tempfile.TemporaryFile(dir=self.config.run_dir) as given:
            given.write(pack(self.config).encode())
            given.seek(0)
            self._process = subprocess.Popen(argv, stdin=given, start_new_session=True)
        logger.info("started the manager (pid {})", self._process.pid)

    def _is_running(self) -> bool:
        """Also reaps one that has ended."""
        if self._process is None:
            return False
        code = self._process.poll()
        if code is None:
            return True
        self._process = None
        if code != 0:
            logger.error("the manager ended with exit code {}; its own words are above or in manager.log", code)
        return False


class _Question:
    """Asked and not yet answered. Commands are not asked again: the old manager may have begun to carry them out."""

    __slots__ = ("answer", "is_sent", "message", "repeats")

    def __init__(self, message: Any, *, repeats: bool) -> None:
        self.message = message
        self.repeats = repeats
        self.is_sent = False
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()


class ManagerLink:
    """One connection at a time, for as long as the worker lives. `worker` names the worker to the manager."""

    def __init__(self, run_dir: RunDir, start_manager: Callable[[float], None]) -> None:
        self.worker = uuid.uuid4().hex
        self._run_dir = run_dir
        self._start_manager = start_manager
        self.numbers = itertools.count(1)
        self._questions: dict[int, _Question] = {}
        self._parts: list[Part] = []
        self._handlers: dict[type, Callable[[Any], None]] = {}
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None
        self._out: list[bytes] = []
        self.is_closing = False

    def add(self, part: Part) -> None:
        self._parts.append(part)
        self._handlers.update(part.handlers)

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="control connection")

    async def close(self) -> None:
        """Refuse what waits and leave; the manager goes on."""
        self.is_closing = True
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._refuse(ShuttingDown("This server is shutting down."))

    @property
    def is_connected(self) -> bool:
        return self._transport is not None

    def number(self) -> int:
        """For the `request` of a question."""
        return next(self.numbers)

    async def ask(self, message: Any, *, repeats: bool = True) -> Any:
        """The manager's answer to a message with a `request`. Raises its refusal as an `ApiError`.

        Without a connection it waits for one; with the loss of it a question `repeats`, a command is refused.
        """
        return await self.begin(message, repeats=repeats)

    def begin(self, message: Any, *, repeats: bool = True) -> asyncio.Future[Any]:
        """`ask`, for those who must know of the answer at the moment it comes: with its callbacks."""
        if self.is_closing:
            raise ShuttingDown("This server is shutting down.")
        question = _Question(message, repeats=repeats)
        self._questions[message.request] = question
        question.answer.add_done_callback(lambda _: self._questions.pop(message.request, None))
        question.is_sent = self._transport is not None
        self.send(message)
        return question.answer

    def send(self, message: messages.ToManager) -> None:
        """Without a connection nothing is sent: the parts say everything that still holds in the next one."""
        if self._transport is None:
            return
        if not self._out:
            asyncio.get_running_loop().call_soon(self._write)
        self._out.append(encode(message))

    def _write(self) -> None:
        """All messages of this turn of the loop at once."""
        out, self._out = self._out, []
        if self._transport is not None and out:
            self._transport.write(b"".join(out))

    def on_message(self, message: messages.ToClient) -> None:
        question = self._questions.get(getattr(message, "request", 0))
        if question is not None and not question.answer.done():
            if isinstance(message, messages.Refused):
                question.answer.set_exception(_error(message))
            else:
                question.answer.set_result(message)
        handler = self._handlers.get(type(message))
        if handler is not None:
            handler(message)

    # ── the connection ──

    async def _run(self) -> None:
        """Keep one connection to a manager; ends only when cancelled."""
        try:
            while True:
                transport, protocol = await self._connect()
                self._on_connected(transport)
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
        give_up_at = loop.time() + CONNECT_TIMEOUT
        while True:
            try:
                return await loop.create_unix_connection(lambda: _Protocol(self), path)
            except OSError:
                self._try_to_start(loop.time())
            if loop.time() > give_up_at:
                logger.error("no manager answers at {}", path)
                self._refuse(EngineUnavailable(_UNREACHABLE, retry_after=1))
                give_up_at = loop.time() + CONNECT_TIMEOUT
            await asyncio.sleep(CONNECT_RETRY_INTERVAL)

    def _try_to_start(self, now: float) -> None:
        try:
            self._start_manager(now)
        except OSError as error:
            logger.error("cannot start the manager: {}", error)

    def _on_connected(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._out.clear()
        hello = messages.Hello(os.getpid(), worker=self.worker)
        for part in self._parts:
            part.greet(hello)
        self.send(hello)
        for question in list(self._questions.values()):
            question.is_sent = True
            self.send(question.message)
        for part in self._parts:
            part.connected()

    def _on_lost(self) -> None:
        self._transport = None
        logger.warning("lost the connection to the manager")
        self._refuse(EngineUnavailable(_UNREACHABLE, retry_after=1), commands_only=True)

    def _refuse(self, error: ApiError, *, commands_only: bool = False) -> None:
        for question in list(self._questions.values()):
            is_meant = not commands_only or (question.is_sent and not question.repeats)
            if is_meant and not question.answer.done():
                question.answer.set_exception(error)


def _error(refused: messages.Refused) -> ApiError:
    error = error_from_code(
        refused.code, refused.message, retry_after=refused.retry_after, should_retry=refused.should_retry
    )
    error.rate_limits = refused.rate_limits
    error.position = refused.position
    return error


class _Protocol(asyncio.Protocol):
    """Decodes the manager's messages; `lost` is done when the connection is gone."""

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

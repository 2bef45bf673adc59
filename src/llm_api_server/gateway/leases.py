"""The worker's end of the control socket: leases on instances, the latest model states, load and unload commands.

Built by `create_app`, run for the life of the app on the worker's event loop. It finds the manager or starts it, and
after a loss connects again; requests under way never notice, requests that wait are asked for anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

from loguru import logger

from llm_api_server import control
from llm_api_server.control import Explained, Explanation, InstanceInfo, Models, ModelStatus, RunDir
from llm_api_server.errors import ApiError, ControlError, EngineUnavailable, ShuttingDown, error_from_code

CONNECT_RETRY_INTERVAL = 0.05
#: How long waiting requests wait for a manager that does not answer.
CONNECT_TIMEOUT = 15.0
#: A manager that ended without serving (it lost the race to be the one) is followed by another try after this.
SPAWN_INTERVAL = 2.0
REPORT_INTERVAL = 0.25
_UNREACHABLE = "The model manager does not answer; try again in a moment."


class Lease:
    """The right to run one request on `instance`; `release` exactly once (again is harmless)."""

    __slots__ = ("_held", "_owner", "instance")

    def __init__(self, owner: Leases, held: _Held) -> None:
        self._owner = owner
        self._held: _Held | None = held
        self.instance = held.info

    def release(self, *, broken: bool = False) -> None:
        """`broken`: the instance did not answer, so nothing more is started there before the manager says so."""
        held, self._held = self._held, None
        if held is not None:
            held.is_drained = held.is_drained or broken
            self._owner.on_release(held)


class _Held:
    """An instance that this worker has grants for."""

    __slots__ = ("grants", "in_flight", "info", "is_drained")

    def __init__(self, info: InstanceInfo) -> None:
        self.info = info
        self.grants = 0
        self.in_flight = 0
        self.is_drained = False


class ManagerProcess:
    """Starts the manager. The manager's own lock sees to it that only one serves."""

    def __init__(self, config_path: Path) -> None:
        self._argv = [sys.executable, "-m", "llm_api_server.manager.main", "--config", str(config_path)]
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = float("-inf")

    def ensure_started(self, now: float) -> None:
        """Start one unless one that this worker started still runs or was started a moment ago."""
        if self._is_running() or now - self._started_at < SPAWN_INTERVAL:
            return
        self._started_at = now
        # Its output goes where ours goes: whoever watches the server sees models load.
        self._process = subprocess.Popen(self._argv, stdin=subprocess.DEVNULL, start_new_session=True)
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


class Leases:
    """All leases of one worker. `models` is the manager's latest word on every configured model."""

    def __init__(self, run_dir: RunDir, start_manager: Callable[[float], None]) -> None:
        self._run_dir = run_dir
        self._start_manager = start_manager
        self._held: dict[str, _Held] = {}
        self._requests = itertools.count(1)
        self._waiting: dict[int, tuple[str, asyncio.Future[Lease]]] = {}
        self._commands: dict[int, asyncio.Future[Models | Explained]] = {}
        self._transport: asyncio.Transport | None = None
        self._report_timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_closing = False
        self.models: Mapping[str, ModelStatus] = {}

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="control connection")

    async def close(self) -> None:
        """Refuse what waits and leave; the manager goes on."""
        self._is_closing = True
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._refuse_waiting(ShuttingDown("This server is shutting down."))

    @property
    def is_connected(self) -> bool:
        return self._transport is not None

    @property
    def is_closing(self) -> bool:
        return self._is_closing

    async def acquire(self, model: str) -> Lease:
        """A lease on an instance of `model`, at once where this worker already uses one, else when it is ready.

        Raises the manager's refusal as an `ApiError`.
        """
        if self._is_closing:
            raise ShuttingDown("This server is shutting down.")
        usable = [one for one in self._held.values() if one.info.model == model and not one.is_drained]
        if usable:
            return self._lease(min(usable, key=lambda one: one.in_flight))
        request = next(self._requests)
        answer: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        self._waiting[request] = (model, answer)
        self._send(control.Acquire(request, model))
        try:
            return await answer
        except asyncio.CancelledError:
            self._give_up(request, answer)
            raise

    async def load(self, model: str, *, wait: bool) -> list[ModelStatus]:
        """Raises `ApiError` when the manager refuses, for example because the load failed."""
        return await self._models_after(control.LoadModel(next(self._requests), model, wait))

    async def unload(self, model: str, *, wait: bool) -> list[ModelStatus]:
        return await self._models_after(control.UnloadModel(next(self._requests), model, wait))

    async def list_models(self) -> list[ModelStatus]:
        """Fresh figures (memory, in flight) where `models` has those of the last change."""
        return await self._models_after(control.ListModels(next(self._requests)))

    async def explain(self, model: str) -> Explanation:
        """Whether it would fit. Raises `ApiError` when its files are bad."""
        answer = await self._command(control.ExplainModel(next(self._requests), model))
        assert isinstance(answer, Explained), "what the manager answers to that"
        return answer.explanation

    # ── leases ──

    def _lease(self, held: _Held) -> Lease:
        held.in_flight += 1
        self._plan_report()
        return Lease(self, held)

    def on_release(self, held: _Held) -> None:
        """Called by `Lease.release`. The last one in flight gives all grants back."""
        held.in_flight -= 1
        self._plan_report()
        self._return_grants(held)

    def _return_grants(self, held: _Held) -> None:
        if held.in_flight > 0 or self._held.get(held.info.id) is not held:
            return
        del self._held[held.info.id]
        self._send(control.Release(held.info.id, held.grants))

    def _give_up(self, request: int, answer: asyncio.Future[Lease]) -> None:
        if self._waiting.pop(request, None) is not None:
            self._send(control.Cancel(request))
        elif answer.done() and not answer.cancelled() and answer.exception() is None:
            answer.result().release()

    # ── messages ──

    def on_message(self, message: control.ToClient) -> None:
        match message:
            case control.Granted(request, instance):
                self._on_granted(request, instance)
            case control.Refused(request, code, text, retry_after, should_retry):
                self._on_refused(
                    request, error_from_code(code, text, retry_after=retry_after, should_retry=should_retry)
                )
            case control.Drain(instance_id):
                if instance_id in self._held:
                    self._held[instance_id].is_drained = True
            case control.Models() | control.Explained():
                self._on_answer(message)

    def _on_granted(self, request: int, info: InstanceInfo) -> None:
        held = self._held.setdefault(info.id, _Held(info))
        held.grants += 1
        held.is_drained = False
        _, answer = self._waiting.pop(request, (None, None))
        if answer is not None and not answer.done():
            answer.set_result(self._lease(held))
        else:
            self._return_grants(held)  # whoever asked has left

    def _on_refused(self, request: int, error: ApiError) -> None:
        _, answer = self._waiting.pop(request, (None, None))
        command = self._commands.pop(request, None)
        for future in (answer, command):
            if future is not None and not future.done():
                future.set_exception(error)

    def _on_answer(self, answer: Models | Explained) -> None:
        if isinstance(answer, Models):
            self.models = {model.id: model for model in answer.models}
        command = self._commands.pop(answer.request, None)
        if command is not None and not command.done():
            command.set_result(answer)

    async def _models_after(self, message: control.Command) -> list[ModelStatus]:
        answer = await self._command(message)
        assert isinstance(answer, Models), "what the manager answers to these"
        return answer.models

    async def _command(self, message: control.Command) -> Models | Explained:
        if self._transport is None:
            raise EngineUnavailable(_UNREACHABLE, retry_after=1)
        answer: asyncio.Future[Models | Explained] = asyncio.get_running_loop().create_future()
        self._commands[message.request] = answer
        self._send(message)
        try:
            return await answer
        finally:
            self._commands.pop(message.request, None)

    def _send(self, message: control.ToManager) -> None:
        """Without a connection nothing is sent: `_on_connected` says everything that still holds."""
        if self._transport is not None:
            self._transport.write(control.encode(message))

    def _plan_report(self) -> None:
        if self._report_timer is None:
            self._report_timer = asyncio.get_running_loop().call_later(REPORT_INTERVAL, self._report)

    def _report(self) -> None:
        self._report_timer = None
        self._send(control.Report(self._in_flight()))

    def _in_flight(self) -> dict[str, int]:
        return {one.info.id: one.in_flight for one in self._held.values()}

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
            if self._report_timer is not None:
                self._report_timer.cancel()
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
                self._refuse_waiting(EngineUnavailable(_UNREACHABLE, retry_after=1))
                give_up_at = loop.time() + CONNECT_TIMEOUT
            await asyncio.sleep(CONNECT_RETRY_INTERVAL)

    def _try_to_start(self, now: float) -> None:
        try:
            self._start_manager(now)
        except OSError as error:
            logger.error("cannot start the manager: {}", error)

    def _on_connected(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        for held in self._held.values():
            held.grants = 1  # what the manager takes each instance of a Hello for
        self._send(control.Hello(os.getpid(), self._in_flight()))
        for request, (model, _) in self._waiting.items():
            self._send(control.Acquire(request, model))

    def _on_lost(self) -> None:
        self._transport = None
        logger.warning("lost the connection to the manager")
        commands, self._commands = self._commands, {}
        for command in commands.values():
            if not command.done():
                command.set_exception(EngineUnavailable(_UNREACHABLE, retry_after=1))

    def _refuse_waiting(self, error: ApiError) -> None:
        waiting, self._waiting = self._waiting, {}
        for _, answer in waiting.values():
            if not answer.done():
                answer.set_exception(error)


class _Protocol(asyncio.Protocol):
    """Decodes the manager's messages; `lost` is done when the connection is gone."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self._decoder = control.to_client_decoder()
        self._transport: asyncio.Transport | None = None
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._decoder.feed(data):
                self._leases.on_message(message)
        except ControlError as error:
            logger.error("control connection closed: {}", error)
            if self._transport is not None:
                self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        if not self.lost.done():
            self.lost.set_result(None)

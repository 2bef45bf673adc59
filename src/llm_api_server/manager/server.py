"""The manager's end of the control socket: connections in, calls of `Manager` and `Accounts` out. On one loop."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, cast

from loguru import logger

from llm_api_server import __version__, control, pull_messages
from llm_api_server.errors import ControlError, InternalError
from llm_api_server.framing import encode

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from llm_api_server.manager.accounts import Accounts
    from llm_api_server.manager.exposition import Exposition
    from llm_api_server.manager.manager import Manager
    from llm_api_server.manager.pulls import Downloads
    from llm_api_server.manager.reloading import Reloading


class Connection(asyncio.Protocol):
    """One worker or command line. Only our own user can connect: the run directory is 0700."""

    def __init__(
        self,
        manager: Manager,
        accounts: Accounts,
        reloading: Reloading,
        exposition: Exposition,
        downloads: Downloads,
        on_shutdown: Callable[[Connection, control.Shutdown], None],
    ) -> None:
        self.is_worker = False
        self.pid = 0
        self.grants: dict[str, int] = {}
        self.running: dict[str, list[str]] = {}
        self.reading: dict[int, tuple[str, int]] = {}
        self.in_flight: dict[str, int] = {}
        self.blocked: dict[str, int] = {}
        self._manager = manager
        self._accounts = accounts
        self._reloading = reloading
        self._exposition = exposition
        self._downloads = downloads
        self._on_shutdown = on_shutdown
        self._decoder = control.to_manager_decoder()
        self._transport: asyncio.Transport | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        self._manager.connected(self)

    def connection_lost(self, _exc: Exception | None) -> None:
        self._manager.disconnected(self)
        self._accounts.disconnected(self)
        self._reloading.disconnected(self)

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._decoder.feed(data):
                self._handle(message)
        except ControlError as error:
            logger.error("control connection closed: {}", error)
            self.close()

    def send(self, message: control.ToClient) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode(message))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _keep(self, request: int, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(self._answered(request, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answered(self, request: int, work: Coroutine[None, None, None]) -> None:
        """Also where `work` fails: whoever asked waits for an answer."""
        try:
            await work
        except Exception:  # noqa: BLE001 - the edge of a command
            logger.exception("command {} failed inside the manager", request)
            message = "The manager had an error while carrying out the command; see its log."
            self.send(control.Refused(request, InternalError.code or "", message))

    def _handle(self, message: control.ToManager) -> None:
        match message:
            case control.Acquire() | control.Cancel() | control.Read() | control.Release() | control.Report():
                self._lease(message)
            case control.Admit() | control.Settle() | control.Spend() | control.FindKey() | control.ReportUsage():
                self._count(message)
            case control.Hello(pid, in_flight, worker, admitted, config):
                self.pid = pid
                self._accounts.hello(self, worker, admitted)
                self._manager.hello(self, in_flight)
                self._reloading.hello(self, config)
            case control.Configured(digest):
                self._reloading.on_configured(self, digest)
            case _:
                self._command(message)

    def _lease(self, message: control.Lease) -> None:
        match message:
            case control.Acquire(request, model, task, claim):
                self._manager.acquire(self, request, model, task, claim)
            case control.Read(number):
                self._manager.on_read(self, number)
            case control.Release(instance, places, ended):
                self._manager.release(self, instance, places, ended)
            case control.Report(in_flight, blocked):
                self._manager.report(self, in_flight, blocked)
            case control.Cancel(request):
                self._manager.cancel(self, request)

    def _count(self, message: control.Account) -> None:
        match message:
            case control.Admit():
                self._accounts.admissions.admit(self, message)
            case control.Settle(request, tokens):
                self._accounts.admissions.settle(self, request, tokens)
            case control.Spend():
                self._accounts.admissions.spend(self, message)
            case control.FindKey():
                self._accounts.find_key(self, message)
            case control.ReportUsage():
                self._accounts.report(self, message)

    def _command(self, message: control.Command) -> None:
        match message:
            case control.LoadModel(request, model, wait):
                self._manager.load(self, request, model, wait=wait)
            case control.UnloadModel(request, model, wait):
                self._manager.unload(self, request, model, wait=wait)
            case control.PinModel(request, model, is_pinned):
                self._manager.pin(self, request, model, is_pinned=is_pinned)
            case control.ListModels(request):
                self._keep(request, self._manager.list_models(self, request))
            case control.ExplainModel(request, model):
                self._keep(request, self._manager.explain(self, request, model))
            case control.GetStatus(request):
                devices = self._manager.board.devices()
                self.send(control.Status(request, os.getpid(), self._manager.workers, __version__, devices))
            case control.ListRequests(request, limit):
                running = self._accounts.open_requests()
                self.send(control.Requests(request, running[:limit], len(running)))
            case control.GetMetrics(request):
                self._keep(request, self._exposition.tell(self, request))
            case control.GetConfig(request):
                self._reloading.tell(self, request)
            case control.Reload(request, dry_run):
                self._keep(request, self._reloading.reload(self, request, dry_run=dry_run))
            case control.Shutdown():
                self._on_shutdown(self, message)
            case _:
                self._pull(message)

    def _pull(self, message: pull_messages.Pull) -> None:
        match message:
            case pull_messages.PullModel():
                self._downloads.start(self, message)
            case pull_messages.ListPulls(request):
                self.send(pull_messages.Pulls(request, self._downloads.statuses()))
            case pull_messages.CancelPull(request, pull):
                self._downloads.cancel(self, request, pull)
            case pull_messages.AddPulled():
                self._keep(message.request, self._downloads.add(self, message))
            case pull_messages.RemoveModel():
                self._keep(message.request, self._downloads.remove(self, message, self._manager.board.statuses()))

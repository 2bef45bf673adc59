"""The manager's end of the control socket: connections in, calls of `Manager` and `UsageWriter` out. On one loop."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, cast

from loguru import logger

from llm_api_server import __version__
from llm_api_server.errors import ControlError, InternalError
from llm_api_server.ipc import download_messages, lease_messages, messages, quota_messages
from llm_api_server.ipc.framing import encode

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from llm_api_server.manager.limits.admission import AdmissionController
    from llm_api_server.manager.manager import Manager
    from llm_api_server.manager.model_files.downloads import Downloads
    from llm_api_server.manager.reload import Reloader
    from llm_api_server.manager.telemetry.exposition import Exposition
    from llm_api_server.manager.usage.key_directory import KeyDirectory
    from llm_api_server.manager.usage.usage_writer import UsageWriter


class ControlConnection(asyncio.Protocol):
    """One worker or command line. Only our own user can connect: the run directory is 0700."""

    def __init__(
        self,
        *,
        manager: Manager,
        admissions: AdmissionController,
        usage: UsageWriter,
        keys: KeyDirectory,
        reloading: Reloader,
        exposition: Exposition,
        downloads: Downloads,
        on_shutdown: Callable[[ControlConnection, messages.Shutdown], None],
    ) -> None:
        self.is_worker = False
        self.pid = 0
        self.grants: dict[str, int] = {}
        self.running: dict[str, list[str]] = {}
        self.reading: dict[int, tuple[str, int]] = {}
        self.in_flight: dict[str, int] = {}
        self.blocked: dict[str, int] = {}
        self._manager = manager
        self._admissions = admissions
        self._usage = usage
        self._keys = keys
        self._reloading = reloading
        self._exposition = exposition
        self._downloads = downloads
        self._on_shutdown = on_shutdown
        self._decoder = messages.to_manager_decoder()
        self._transport: asyncio.Transport | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        self._manager.connected(self)

    def connection_lost(self, _exc: Exception | None) -> None:
        self._manager.disconnected(self)
        self._admissions.disconnected(self)
        self._usage.disconnect(self)
        self._keys.disconnect(self)
        self._reloading.disconnected(self)

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._decoder.feed(data):
                self._handle(message)
        except ControlError as error:
            logger.error("control connection closed: {}", error)
            self.close()

    def send(self, message: messages.ToClient) -> None:
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
            self.send(messages.Refused(request, InternalError.code or "", message))

    def _handle(self, message: messages.ToManager) -> None:
        match message:
            case (
                lease_messages.Acquire()
                | lease_messages.Cancel()
                | lease_messages.PrefillDone()
                | lease_messages.ReturnSlots()
                | lease_messages.ReportInFlight()
            ):
                self._lease(message)
            case (
                quota_messages.Admit()
                | quota_messages.Settle()
                | quota_messages.ReportQuota()
                | messages.FindKey()
                | messages.ReportUsage()
            ):
                self._count(message)
            case messages.Hello(pid, in_flight, worker, admitted, config):
                self.pid = pid
                self._admissions.hello(self, admitted)
                self._usage.connect(self, worker)
                self._keys.connect(self)
                self._manager.hello(self, in_flight)
                self._reloading.hello(self, config)
            case messages.Configured(digest):
                self._reloading.on_configured(self, digest)
            case _:
                self._command(message)

    def _lease(self, message: messages.SlotMessage) -> None:
        match message:
            case lease_messages.Acquire(request, model, task, claim):
                self._manager.acquire(self, request, model, task, claim)
            case lease_messages.PrefillDone(number):
                self._manager.on_prefill_done(self, number)
            case lease_messages.ReturnSlots(instance, places, ended):
                self._manager.return_slots(self, instance, places, ended)
            case lease_messages.ReportInFlight(in_flight, blocked):
                self._manager.report_in_flight(self, in_flight, blocked)
            case lease_messages.Cancel(request):
                self._manager.cancel(self, request)

    def _count(self, message: messages.QuotaMessage) -> None:
        match message:
            case quota_messages.Admit():
                self._admissions.admit(self, message)
            case quota_messages.Settle(request, tokens):
                self._admissions.settle(self, request, tokens)
            case quota_messages.ReportQuota():
                self._admissions.spend(self, message)
            case messages.FindKey():
                self._keys.find(self, message)
            case messages.ReportUsage():
                self._usage.report(self, message)

    def _command(self, message: messages.Command) -> None:
        match message:
            case messages.LoadModel(request, model, wait):
                self._manager.load(self, request, model, wait=wait)
            case messages.UnloadModel(request, model, wait):
                self._manager.unload(self, request, model, wait=wait)
            case messages.PinModel(request, model, is_pinned):
                self._manager.pin(self, request, model, is_pinned=is_pinned)
            case messages.ListModels(request):
                self._keep(request, self._manager.list_models(self, request))
            case messages.ExplainModel(request, model):
                self._keep(request, self._manager.explain(self, request, model))
            case messages.GetStatus(request):
                devices = self._manager.device_statuses()
                self.send(messages.Status(request, os.getpid(), self._manager.workers, __version__, devices))
            case messages.ListRequests(request, limit):
                running = self._usage.open_requests()
                self.send(messages.Requests(request, running[:limit], len(running)))
            case messages.GetMetrics(request):
                self._keep(request, self._send_metrics(request))
            case messages.GetConfig(request):
                self._reloading.tell(self, request)
            case messages.ReloadConfig(request, dry_run):
                self._keep(request, self._reloading.reload(self, request, dry_run=dry_run))
            case messages.Shutdown():
                self._on_shutdown(self, message)
            case _:
                self._pull(message)

    async def _send_metrics(self, request: int) -> None:
        self.send(messages.MetricsText(request, await self._exposition.text()))

    def _pull(self, message: download_messages.Pull) -> None:
        match message:
            case download_messages.PullModel():
                self._downloads.start(self, message)
            case download_messages.ListPulls(request):
                self.send(download_messages.Pulls(request, self._downloads.statuses()))
            case download_messages.CancelPull(request, pull):
                self._downloads.cancel(self, request, pull)
            case download_messages.AddPulled():
                self._keep(message.request, self._downloads.add(self, message))
            case download_messages.RemoveModel():
                self._keep(message.request, self._downloads.remove(self, message, self._manager.statuses()))

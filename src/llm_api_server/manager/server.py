"""The manager's end of the control socket: decodes messages and calls their handlers, on the manager's one loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, cast

from loguru import logger

from llm_api_server import __version__
from llm_api_server.errors import ControlError, InternalError
from llm_api_server.event_loop.background import TaskSet
from llm_api_server.ipc.download_messages import (
    AddDownloaded,
    CancelDownload,
    DownloadStatuses,
    ListDownloads,
    RemoveModel,
    StartDownload,
)
from llm_api_server.ipc.framing import encode
from llm_api_server.ipc.lease_messages import Acquire, Cancel, PrefillDone, ReportInFlight, ReturnSlots
from llm_api_server.ipc.messages import (
    Configured,
    ExplainModel,
    FindKey,
    GetConfig,
    GetMetrics,
    GetStatus,
    Hello,
    ListModels,
    ListRequests,
    LoadModel,
    MetricsText,
    PinModel,
    Refused,
    ReloadConfig,
    ReportUsage,
    Requests,
    Shutdown,
    Status,
    ToClient,
    ToManager,
    UnloadModel,
    to_manager_decoder,
)
from llm_api_server.ipc.quota_messages import Admit, ReportQuota, Settle
from llm_api_server.manager.limits.admission import AdmissionController
from llm_api_server.manager.manager import Manager
from llm_api_server.manager.model_files.downloads import Downloads
from llm_api_server.manager.reload import Reloader
from llm_api_server.manager.telemetry.exposition import Exposition
from llm_api_server.manager.usage.key_directory import KeyDirectory
from llm_api_server.manager.usage.usage_writer import UsageWriter
from llm_api_server.manager.worker_session import WorkerSession

#: Handles a message of a session. Work that has to wait is returned as a coroutine.
Handler = Callable[[WorkerSession, Any], Coroutine[Any, Any, None] | None]


class ControlServer:
    """The parts of the manager behind the control socket, and the handler for each type of message."""

    def __init__(
        self,
        *,
        manager: Manager,
        admissions: AdmissionController,
        usage: UsageWriter,
        keys: KeyDirectory,
        reloader: Reloader,
        exposition: Exposition,
        downloads: Downloads,
        on_shutdown: Callable[[WorkerSession, Shutdown], None],
    ) -> None:
        self._manager = manager
        self._admissions = admissions
        self._usage = usage
        self._reloader = reloader
        self._exposition = exposition
        self.handlers: Mapping[type[ToManager], Handler] = {
            Hello: self._register,
            Acquire: lambda session, m: manager.acquire(session, m.request, m.model, m.task, m.claim),
            Cancel: lambda session, m: manager.cancel(session, m.request),
            PrefillDone: lambda session, m: manager.on_prefill_done(session, m.request),
            ReturnSlots: lambda session, m: manager.return_slots(session, m.instance, m.slots, m.ended),
            ReportInFlight: lambda session, m: manager.report_in_flight(session, m.in_flight, m.blocked),
            Admit: admissions.admit,
            Settle: admissions.settle,
            ReportQuota: admissions.report,
            FindKey: keys.find,
            ReportUsage: usage.report,
            LoadModel: lambda session, m: manager.load(session, m.request, m.model, wait=m.wait),
            UnloadModel: lambda session, m: manager.unload(session, m.request, m.model, wait=m.wait),
            PinModel: lambda session, m: manager.pin(session, m.request, m.model, is_pinned=m.is_pinned),
            ListModels: lambda session, m: manager.list_models(session, m.request),
            ExplainModel: lambda session, m: manager.explain(session, m.request, m.model),
            GetStatus: self._send_status,
            ListRequests: self._send_requests,
            GetMetrics: self._send_metrics,
            GetConfig: reloader.send_config,
            ReloadConfig: reloader.reload,
            Configured: reloader.on_configured,
            Shutdown: on_shutdown,
            StartDownload: downloads.start,
            ListDownloads: lambda session, m: session.send(DownloadStatuses(m.request, downloads.statuses())),
            CancelDownload: lambda session, m: downloads.cancel(session, m.request, m.download),
            AddDownloaded: downloads.add,
            RemoveModel: lambda session, m: downloads.remove(session, m, manager.statuses()),
        }

    def connection(self) -> ControlConnection:
        """Return the protocol of a new connection."""
        return ControlConnection(self)

    def connect(self, session: WorkerSession) -> None:
        self._manager.connect(session)

    def disconnect(self, session: WorkerSession) -> None:
        self._manager.disconnect(session)
        self._admissions.disconnect(session)
        self._usage.disconnect(session)
        self._reloader.disconnect()

    def _register(self, session: WorkerSession, hello: Hello) -> None:
        self._admissions.register(session, hello.admitted)
        self._manager.register(session, hello)
        self._reloader.register(session)

    def _send_status(self, session: WorkerSession, message: GetStatus) -> None:
        workers, devices = self._manager.workers, self._manager.device_statuses()
        session.send(Status(message.request, os.getpid(), workers, __version__, devices))

    def _send_requests(self, session: WorkerSession, message: ListRequests) -> None:
        running = self._usage.open_requests()
        session.send(Requests(message.request, running[: message.limit], len(running)))

    async def _send_metrics(self, session: WorkerSession, message: GetMetrics) -> None:
        session.send(MetricsText(message.request, await self._exposition.text()))


class ControlConnection(asyncio.Protocol):
    """Connection of a worker or command line. Only our own user can connect: the run directory has mode 0700."""

    def __init__(self, server: ControlServer) -> None:
        self._server = server
        self._session = WorkerSession(self._send)
        self._decoder = to_manager_decoder()
        self._transport: asyncio.Transport | None = None
        self._tasks = TaskSet()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        self._server.connect(self._session)

    def connection_lost(self, _exc: Exception | None) -> None:
        self._server.disconnect(self._session)

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._decoder.feed(data):
                work = self._server.handlers[type(message)](self._session, message)
                if work is not None:
                    self._tasks.start(self._guard(message, work))
        except ControlError as error:
            logger.error("control connection closed: {}", error)
            if self._transport is not None:
                self._transport.close()

    def _send(self, message: ToClient) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode(message))

    async def _guard(self, message: Any, work: Coroutine[Any, Any, None]) -> None:
        """Send an error response even if `work` raises, so that the caller never hangs."""
        try:
            await work
        except Exception:  # noqa: BLE001 - the edge of a command
            logger.exception("command {} failed inside the manager", message.request)
            text = "The manager had an error while carrying out the command; see its log."
            self._send(Refused(message.request, InternalError.code or "", text))

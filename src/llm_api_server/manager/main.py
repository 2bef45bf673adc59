"""The manager process: `python -m llm_api_server.manager.main --config FILE`.

API workers start it and hand it the configuration that they follow; one manager runs per run directory. It ends on
SIGTERM, on a `Shutdown` command, or when no worker has been connected for a while.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import uvloop
from loguru import logger

from llm_api_server.config.load import load_config
from llm_api_server.config.models import Config, StorageConfig
from llm_api_server.devices.host import this_host
from llm_api_server.devices.inventory import HostInventory
from llm_api_server.engines.select import engines_by_model
from llm_api_server.errors import ConfigError
from llm_api_server.event_loop.gc_tuning import tune_gc
from llm_api_server.ipc import messages
from llm_api_server.ipc.model_status import ModelStatus
from llm_api_server.ipc.run_dir import RunDir
from llm_api_server.lifecycle.config_handover import unpack
from llm_api_server.log import setup_logging
from llm_api_server.manager.instances.guard import MANAGER_LOCK
from llm_api_server.manager.instances.process import ORPHAN_TIMEOUT, LocalLauncher
from llm_api_server.manager.instances.zygote_launcher import ZygoteLauncher
from llm_api_server.manager.limits.admission import AdmissionController
from llm_api_server.manager.limits.snapshot import QuotaSnapshot
from llm_api_server.manager.manager import Manager
from llm_api_server.manager.model_files.downloads import Downloads
from llm_api_server.manager.reload import Reloader
from llm_api_server.manager.server import ControlServer
from llm_api_server.manager.telemetry.counters import Counters
from llm_api_server.manager.telemetry.exposition import Exposition, Snapshot
from llm_api_server.manager.telemetry.load_telemetry import LoadTelemetry
from llm_api_server.manager.telemetry.tracing import Tracing
from llm_api_server.manager.usage.key_directory import KeyDirectory
from llm_api_server.manager.usage.store_executor import StoreExecutor
from llm_api_server.manager.usage.usage_writer import UsageWriter
from llm_api_server.manager.worker_session import WorkerSession, WorkerSessions
from llm_api_server.store.database import Database
from llm_api_server.store.keys import Keys
from llm_api_server.store.usage import UsageLedger

#: Seconds that a second manager waits for a first one that is about to end.
_LOCK_TIMEOUT = 60.0


def main(arguments: list[str] | None = None) -> int:
    """Return 0 after an orderly end or if another manager already serves, 2 for a bad configuration."""
    parser = argparse.ArgumentParser(prog="llm-api-server-manager", description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument(
        "--applied", action="store_true", help="read the configuration, packed by config_handover.py, from stdin"
    )
    given = parser.parse_args(arguments)
    try:
        config = unpack(sys.stdin.buffer.read()) if given.applied else load_config(given.config)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    run_dir = RunDir(config.ensure_run_dir())
    with _locked(run_dir) as is_first:
        if is_first:
            setup_logging(config, "manager")
            uvloop.run(_serve(config, run_dir))
    return 0


@contextlib.contextmanager
def _locked(run_dir: RunDir) -> Iterator[bool]:
    """Hold the manager's lock; yield False if another manager holds it and accepts connections."""
    with run_dir.lock.open("a+b") as file:
        end = time.monotonic() + _LOCK_TIMEOUT
        while not _try_lock(file.fileno()):
            if _accepts_connections(run_dir) or time.monotonic() > end:
                yield False
                return
            time.sleep(0.05)
        yield True


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, MANAGER_LOCK)
    except BlockingIOError:
        return False
    return True


def _accepts_connections(run_dir: RunDir) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        return connection.connect_ex(str(run_dir.socket)) == 0


async def _serve(config: Config, run_dir: RunDir) -> None:
    shutdown = _Shutdown()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, shutdown.requested.set)
    parts = _Parts(config, run_dir, shutdown)
    await parts.start()
    tune_gc()
    logger.info("manager ready (pid {}), {} models configured", os.getpid(), len(config.models.available))
    await _wait_for_end(parts.manager, shutdown.requested)
    await parts.stop(keeps_engines=shutdown.keeps_engines)
    shutdown.reply(parts.manager.statuses())
    logger.info("manager stopped")


class _Shutdown:
    """Signal or commands to shut down, and the connections that wait for the reply."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self._commands: list[tuple[WorkerSession, messages.Shutdown]] = []

    def on_command(self, session: WorkerSession, command: messages.Shutdown) -> None:
        self._commands.append((session, command))
        self.requested.set()

    @property
    def keeps_engines(self) -> bool:
        return bool(self._commands) and all(command.keeps_engines for _, command in self._commands)

    def reply(self, statuses: list[ModelStatus]) -> None:
        for session, command in self._commands:
            session.send(messages.Models(statuses, command.request))


class _Parts:
    """Parts of the manager process. They start in the order in which they are built, and stop in the reverse one."""

    def __init__(self, config: Config, run_dir: RunDir, shutdown: _Shutdown) -> None:
        self._run_dir = run_dir
        run_dir.engines.mkdir(mode=0o700, exist_ok=True)
        self.counters, self.tracing = Counters(), Tracing()
        self.tracing.configure(config.tracing)
        sessions, database = WorkerSessions(), Database(config.storage_url)
        self.store = _StoreServices.build(
            database, config.storage, run_dir, sessions=sessions, counters=self.counters, tracing=self.tracing
        )
        self.launcher = ZygoteLauncher(LocalLauncher(run_dir), config.log_dir / "zygote.log")
        self.manager = Manager(
            config,
            engines_by_model(config),
            launcher=self.launcher,
            run_dir=run_dir,
            log_dir=config.log_dir,
            inventory=HostInventory(config.devices, this_host()),
            telemetry=LoadTelemetry(self.counters, self.tracing),
            sessions=sessions,
        )
        self.reloader = Reloader(config, self._follow, sessions)
        self.downloads = Downloads(config.source, self.reloader.follow_file)
        self.control = ControlServer(
            manager=self.manager,
            admissions=self.store.admissions,
            usage=self.store.usage,
            keys=self.store.keys,
            reloader=self.reloader,
            exposition=Exposition(self.counters, self._snapshot),
            downloads=self.downloads,
            on_shutdown=shutdown.on_command,
        )
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._run_dir.socket.unlink(missing_ok=True)
        self.store.start()
        await self.manager.start()
        loop, path = asyncio.get_running_loop(), self._run_dir.socket
        self._server = await loop.create_unix_server(self.control.connection, str(path))
        path.chmod(0o600)

    async def stop(self, *, keeps_engines: bool) -> None:
        """Stop all parts. With `keeps_engines` the engines serve on, for the next manager to adopt."""
        self._run_dir.socket.unlink(missing_ok=True)
        if self._server is not None:
            self._server.close()
        await (self.manager.leave() if keeps_engines else self.manager.close())
        await self.downloads.close()
        await self.launcher.close()
        await self.store.close()
        await self.tracing.close()

    async def _follow(self, config: Config) -> None:
        """Follow another configuration."""
        setup_logging(config, "manager")
        self.store.keys.configure(config.storage.key_grace)
        self.store.usage.configure(config.storage)
        self.tracing.configure(config.tracing)
        await self.manager.configure(config, engines_by_model(config))

    async def _snapshot(self) -> Snapshot:
        await self.manager.measure_memory()
        return Snapshot(
            models=self.manager.statuses(),
            devices=self.manager.device_statuses(),
            engines=self.manager.ready_processes(),
            workers=self.manager.workers,
            is_store_up=self.store.keys.is_store_up,
            waiting_reports=self.store.usage.waiting_reports,
        )


@dataclass(frozen=True)
class _StoreServices:
    """Parts of the manager that use the database, with one start and one stop order."""

    executor: StoreExecutor
    keys: KeyDirectory
    admissions: AdmissionController
    quotas: QuotaSnapshot
    usage: UsageWriter

    @classmethod
    def build(
        cls,
        database: Database,
        storage: StorageConfig,
        run_dir: RunDir,
        *,
        sessions: WorkerSessions,
        counters: Counters,
        tracing: Tracing,
    ) -> _StoreServices:
        executor, ledger = StoreExecutor(database), UsageLedger(database)

        async def spent(key_id: str) -> tuple[int, int]:
            # Behind all writes, so that nothing counts twice.
            return await executor.write(ledger.spent, key_id, time.time())

        keys = KeyDirectory(executor, Keys(database), sessions, storage.key_grace)
        admissions = AdmissionController(spent, counters.limit_hit)
        usage = UsageWriter(
            executor,
            ledger,
            storage,
            sessions=sessions,
            admissions=admissions,
            counters=counters,
            tracing=tracing,
            is_store_up=lambda: keys.is_store_up,
        )
        return cls(executor, keys, admissions, QuotaSnapshot(run_dir.minutes, admissions), usage)

    def start(self) -> None:
        self.quotas.start()
        self.keys.start()
        self.usage.start()

    async def close(self) -> None:
        self.keys.close()
        await self.quotas.close()
        await self.usage.close()
        self.executor.close()


async def _wait_for_end(manager: Manager, requested: asyncio.Event) -> None:
    """Wait for a shutdown, or until no worker has been connected for `ORPHAN_TIMEOUT` seconds."""
    alone_since = time.monotonic()
    while not requested.is_set():
        if manager.workers:
            alone_since = time.monotonic()
        elif time.monotonic() - alone_since > ORPHAN_TIMEOUT:
            logger.info("no API worker for {:.0f} s: stopping", ORPHAN_TIMEOUT)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                await requested.wait()


if __name__ == "__main__":
    sys.exit(main())

"""The manager process: `python -m llm_api_server.manager.main --config FILE`. API workers start it, and give it the
configuration that they follow; one runs per run directory. It ends on SIGTERM, on a `Shutdown` command, or when no
worker has been connected for a while.

Start order: lock, adopt or end old engines, listen, preload. Stop is the reverse.
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
from llm_api_server.config.models import Config
from llm_api_server.devices.host import this_host
from llm_api_server.devices.inventory import HostInventory
from llm_api_server.engines.select import engines_by_model
from llm_api_server.errors import ConfigError
from llm_api_server.event_loop.gc_tuning import tune_gc
from llm_api_server.ipc import messages
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
from llm_api_server.manager.server import ControlConnection
from llm_api_server.manager.telemetry.exposition import Exposition, Snapshot
from llm_api_server.manager.usage.key_directory import KeyDirectory
from llm_api_server.manager.usage.store_executor import StoreExecutor
from llm_api_server.manager.usage.usage_writer import UsageWriter
from llm_api_server.store.database import Database
from llm_api_server.store.keys import Keys
from llm_api_server.store.usage import UsageLedger

#: How long a second manager waits for a first one that is just ending.
_LOCK_TIMEOUT = 60.0


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 after an orderly end or when another manager already serves, 2 for a bad configuration."""
    parser = argparse.ArgumentParser(prog="llm-api-server-manager", description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--applied", action="store_true", help="standard input has it, as `applied_config.py` packs it")
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
    """Hold the manager's lock; False when another manager holds it and answers."""
    with run_dir.lock.open("a+b") as file:
        end = time.monotonic() + _LOCK_TIMEOUT
        while not _try_lock(file.fileno()):
            if _answers(run_dir) or time.monotonic() > end:
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


def _answers(run_dir: RunDir) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        return connection.connect_ex(str(run_dir.socket)) == 0


@dataclass(frozen=True)
class _StoreServices:
    """Parts of the manager that use the database, with one start and one stop order."""

    executor: StoreExecutor
    keys: KeyDirectory
    admissions: AdmissionController
    quotas: QuotaSnapshot
    usage: UsageWriter

    @classmethod
    def build(cls, config: Config, run_dir: RunDir, manager: Manager) -> _StoreServices:
        database = Database(config.storage_url)
        executor, ledger = StoreExecutor(database), UsageLedger(database)

        async def spent(key_id: str) -> tuple[int, int]:
            # Behind all writes, so that nothing counts twice.
            return await executor.write(ledger.spent, key_id, time.time())

        keys = KeyDirectory(executor, Keys(database), config.storage.key_grace)
        admissions = AdmissionController(spent, manager.tally.limit_hit)
        usage = UsageWriter(
            executor,
            ledger,
            config.storage,
            admissions=admissions,
            counters=manager.tally,
            tracing=manager.tracing,
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


async def _serve(config: Config, run_dir: RunDir) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    run_dir.engines.mkdir(mode=0o700, exist_ok=True)
    launcher = ZygoteLauncher(LocalLauncher(run_dir), config.log_dir / "zygote.log")
    inventory = HostInventory(config.devices, this_host())
    manager = Manager(config, engines_by_model(config), launcher, run_dir, config.log_dir, inventory)
    leaving: list[tuple[ControlConnection, messages.Shutdown]] = []

    def on_shutdown(client: ControlConnection, command: messages.Shutdown) -> None:
        leaving.append((client, command))
        stop.set()

    store = _StoreServices.build(config, run_dir, manager)

    async def snapshot() -> Snapshot:
        await manager.board.measure()
        return Snapshot(
            models=manager.board.statuses(),
            devices=manager.board.devices(),
            engines=manager.board.engines(),
            workers=manager.workers,
            is_store_up=store.keys.is_store_up,
            waiting_reports=store.usage.waiting_reports,
        )

    exposition = Exposition(manager.tally, snapshot)

    async def follow_file() -> str | None:
        answer = await reloading.follow_file()
        return answer.message if isinstance(answer, messages.Refused) else None

    downloads = Downloads(config.source, follow_file)

    async def follow(config: Config) -> None:
        setup_logging(config, "manager")
        store.keys.configure(config.storage.key_grace)
        store.usage.configure(config.storage)
        await manager.configure(config, engines_by_model(config))

    reloading = Reloader(config, follow)
    run_dir.socket.unlink(missing_ok=True)
    store.start()
    await manager.start()
    server = await loop.create_unix_server(
        lambda: ControlConnection(
            manager=manager,
            admissions=store.admissions,
            usage=store.usage,
            keys=store.keys,
            reloading=reloading,
            exposition=exposition,
            downloads=downloads,
            on_shutdown=on_shutdown,
        ),
        str(run_dir.socket),
    )
    run_dir.socket.chmod(0o600)
    tune_gc()
    logger.info("manager ready (pid {}), {} models configured", os.getpid(), len(config.models.available))
    await _wait_for_end(manager, stop)
    run_dir.socket.unlink(missing_ok=True)
    server.close()
    if leaving and all(command.keeps_engines for _, command in leaving):
        await manager.leave()
    else:
        await manager.close()
    await downloads.close()
    await launcher.close()
    await store.close()
    await manager.tracing.close()
    for client, command in leaving:
        client.send(messages.Models(manager.board.statuses(), command.request))
    logger.info("manager stopped")


async def _wait_for_end(manager: Manager, stop: asyncio.Event) -> None:
    """Until told to stop, or nobody has been there for `ORPHAN_TIMEOUT` seconds."""
    alone_since = time.monotonic()
    while not stop.is_set():
        if manager.workers:
            alone_since = time.monotonic()
        elif time.monotonic() - alone_since > ORPHAN_TIMEOUT:
            logger.info("no API worker for {:.0f} s: stopping", ORPHAN_TIMEOUT)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                await stop.wait()


if __name__ == "__main__":
    sys.exit(main())

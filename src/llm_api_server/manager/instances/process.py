"""Engine processes on this host: started under a guard, watched by pidfd, stopped, measured and adopted.

`Launcher` is the seam for engines on other hosts.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Protocol

import psutil

from llm_api_server.engines.base import LaunchPlan
from llm_api_server.ipc.run_dir import RunDir
from llm_api_server.manager.instances.adoption_records import AdoptionRecord

_GUARD = Path(__file__).with_name("guard.py")
#: Seconds that an engine has to end after SIGTERM before its guard kills it.
STOP_TIMEOUT = 10.0
#: Seconds that an engine continues to serve without a manager.
ORPHAN_TIMEOUT = 30.0
#: Prefixes of environment variables that engines do not inherit: secrets of the server, or what slows imports down.
_WITHHELD = ("LLM_API_SERVER_", "PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "PYTHONHOME")


class Process(Protocol):
    """A running engine. `wait` returns its exit code, or None if it is unknown (an adopted process)."""

    @property
    def pid(self) -> int: ...
    @property
    def start_time(self) -> int: ...
    async def wait(self) -> int | None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...
    def memory_bytes(self) -> int | None: ...


class Launcher(Protocol):
    """Starts engines, and adopts those that an earlier manager started."""

    async def start(self, plan: LaunchPlan, log: Path) -> Process: ...
    def adopt(self, record: AdoptionRecord) -> Process | None: ...


class LocalLauncher:
    """Launcher for processes of this host."""

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir

    async def start(self, plan: LaunchPlan, log: Path) -> Process:
        """Start `plan.argv`, with its output appended to `log`. Raises `OSError`."""
        with open_log(log) as output:
            child = subprocess.Popen(  # noqa: ASYNC220 - milliseconds; nothing is waited for
                [*self.guard_command(), "--", *plan.argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=engine_environment(plan),
                start_new_session=True,
                umask=0o077,
            )

        async def collect() -> int:
            return child.wait()

        return GuardedProcess(child.pid, collect)

    def guard_command(self) -> list[str]:
        """Return the command of a guard, to which the arguments for its child are appended."""
        timeouts = [str(ORPHAN_TIMEOUT), str(STOP_TIMEOUT)]
        return [sys.executable, "-I", "-S", str(_GUARD), str(self._run_dir.lock), *timeouts]

    def adopt(self, record: AdoptionRecord) -> Process | None:
        """Return the process of `record` if it still runs."""
        if process_start_time(record.pid) != record.start_time:
            return None
        with contextlib.suppress(ProcessLookupError):
            return GuardedProcess(record.pid, _no_exit_code)
        return None


class GuardedProcess:
    """A guard with the engine as its child. It is held by a pidfd, so that a reused pid cannot be mistaken for it.

    `collect` is awaited once, after the guard has ended, and returns its exit code.
    """

    def __init__(self, pid: int, collect: Callable[[], Awaitable[int | None]], pidfd: int | None = None) -> None:
        self.pid = pid
        self._collect = collect
        self._pidfd = os.pidfd_open(pid) if pidfd is None else pidfd
        self.start_time = process_start_time(pid) or 0
        self._ended = asyncio.Event()
        self._exit_code: int | None = None
        self._has_ended = False
        self._collection: asyncio.Task[None] | None = None
        asyncio.get_running_loop().add_reader(self._pidfd, self._on_end)

    def _on_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._has_ended = True
        self._collection = asyncio.create_task(self._finish())

    async def _finish(self) -> None:
        self._exit_code = await self._collect()
        self._ended.set()

    async def wait(self) -> int | None:
        await self._ended.wait()
        return self._exit_code

    def terminate(self) -> None:
        """Send SIGTERM to the guard, which ends the engine, by force after `STOP_TIMEOUT`."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the guard; the kernel then kills the engine as well."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if not self._has_ended:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def memory_bytes(self) -> int | None:
        """Return the RAM of the guard and its descendants; shared pages count in proportion."""
        try:
            guard = psutil.Process(self.pid)
            processes = [guard, *guard.children(recursive=True)]
        except psutil.Error:
            return None
        sizes = [size for process in processes if (size := proportional_size(process.pid)) is not None]
        return sum(sizes) if sizes else None


async def _no_exit_code() -> None:
    """Return None: an adopted process is not a child of this one."""


def engine_environment(plan: LaunchPlan) -> dict[str, str]:
    """Return the manager's environment without the withheld variables, and with those of the plan."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_WITHHELD)} | plan.env


class NoProcess:
    """Process of an instance that runs elsewhere (a remote URL): there is nothing to watch or to end."""

    pid = 0
    start_time = 0

    def __init__(self) -> None:
        self._ended = asyncio.Event()

    async def wait(self) -> int | None:
        await self._ended.wait()
        return 0

    def terminate(self) -> None:
        self._ended.set()

    def kill(self) -> None:
        self._ended.set()

    def memory_bytes(self) -> int | None:
        return None


def process_start_time(pid: int) -> int | None:
    """Return the start time in clock ticks since boot, or None if there is no such process or it is a zombie.

    Field 22 of /proc/PID/stat (proc(5)). Adoption records contain it, so it is not psutil's, which is a wall time.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in {"Z", "X"} else int(fields[19])


def proportional_size(pid: int) -> int | None:
    """Return the RAM of a process in bytes, or None if there is no such process; shared pages count in proportion."""
    try:
        return int(psutil.Process(pid).memory_full_info().pss) or None  # 0: a zombie
    except psutil.Error:
        return None


def open_log(log: Path) -> contextlib.AbstractContextManager[int]:
    """Open an engine's log file for appending, or /dev/null if that fails: a full disk must not stop a model."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        return _closing(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640))
    except OSError:
        return _closing(os.open(os.devnull, os.O_WRONLY))


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)

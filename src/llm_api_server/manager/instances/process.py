"""Engine processes on this host: start under a guard, watch by pidfd, stop, measure, find again. Called by the manager.

`Launcher` is the seam: starting instances elsewhere means another implementation of it.
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

from llm_api_server.engines.base import LaunchPlan
from llm_api_server.ipc.run_dir import RunDir
from llm_api_server.manager.instances.adoption_records import AdoptionRecord

_GUARD = Path(__file__).with_name("guard.py")
#: Seconds an engine has to end by itself after SIGTERM, before its guard kills it.
STOP_TIMEOUT = 10.0
#: Seconds an engine serves on without a manager.
ORPHAN_TIMEOUT = 30.0
#: Never handed to an engine: it is not the engine's secret, or it makes every import slow.
_WITHHELD = ("LLM_API_SERVER_", "PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "PYTHONHOME")


class Process(Protocol):
    """A running engine. `wait` answers its exit code, or None when it cannot be known (an adopted one)."""

    @property
    def pid(self) -> int: ...
    @property
    def start_time(self) -> int: ...
    async def wait(self) -> int | None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...
    def memory_bytes(self) -> int | None: ...


class Launcher(Protocol):
    async def start(self, plan: LaunchPlan, log: Path) -> Process: ...
    def adopt(self, record: AdoptionRecord) -> Process | None: ...


class LocalLauncher:
    """Starts engines as processes of this host."""

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir

    async def start(self, plan: LaunchPlan, log: Path) -> Process:
        """Start `plan.argv`; its output is appended to `log`. Raises `OSError` when it cannot."""
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
        """Still to be told what to guard."""
        timeouts = [str(ORPHAN_TIMEOUT), str(STOP_TIMEOUT)]
        return [sys.executable, "-I", "-S", str(_GUARD), str(self._run_dir.lock), *timeouts]

    def adopt(self, record: AdoptionRecord) -> Process | None:
        """The process of `record` if it still runs."""
        if process_start_time(record.pid) != record.start_time:
            return None
        with contextlib.suppress(ProcessLookupError):
            return GuardedProcess(record.pid, _no_exit_code)
        return None


class GuardedProcess:
    """A guard and, below it, the engine. Holds a pidfd from the beginning: the pid cannot come to mean another.

    `collect` is awaited once, when the guard has ended, and answers its exit code.
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
        """SIGTERM to the guard: it ends the engine, by force after `STOP_TIMEOUT`."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """For a guard that does not obey: the kernel then kills the engine as well."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if not self._has_ended:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def memory_bytes(self) -> int | None:
        """Memory of the guard and all below it; pages shared with others count in proportion."""
        sizes = [size for pid in _tree(self.pid) if (size := proportional_size(pid)) is not None]
        return sum(sizes) if sizes else None


async def _no_exit_code() -> None:
    """An adopted process is another's child."""


def engine_environment(plan: LaunchPlan) -> dict[str, str]:
    """The manager's own, cleaned, and what the plan adds."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_WITHHELD)} | plan.env


class NoProcess:
    """Stands for an instance that runs elsewhere (a remote URL): nothing to watch, nothing to end but the waiting."""

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
    """Field 22 of /proc/PID/stat (proc(5)): clock ticks after boot; None when there is no such process or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in {"Z", "X"} else int(fields[19])


def _tree(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    except OSError:
        return []
    return [pid, *(below for child in text.split() for below in _tree(int(child)))]


def proportional_size(pid: int) -> int | None:
    """RAM of one process in bytes; pages shared with others count in proportion. None when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return None


def open_log(log: Path) -> contextlib.AbstractContextManager[int]:
    """The engine's log file to append to; nowhere when it cannot be written (a full disk must not stop a model)."""
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

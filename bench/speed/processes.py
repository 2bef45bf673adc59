"""Starts programs for the measurements, each on its core, and reads their CPU time and memory from /proc."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
#: Folder for peers, native programs and their output, outside of git.
CACHE = ROOT / ".cache" / "bench"
#: The engine and the load generator share one core; the contender has the other.
LOAD_CORE, GATEWAY_CORE = 0, (os.cpu_count() or 1) - 1
START_TIMEOUT = 120.0
STOP_TIMEOUT = 30.0
_TICK = os.sysconf("SC_CLK_TCK")


def native(name: str) -> Path:
    """Return `NAME.c` of this folder as a program; compile it if it has changed."""
    source, program = HERE / f"{name}.c", CACHE / name
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        CACHE.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
        subprocess.run(
            [*compiler.split(), "-O2", "-Wall", "-Wextra", "-std=gnu11", "-o", str(program), str(source)], check=True
        )
    return program


@contextlib.contextmanager
def started(
    argv: list[str], core: int | str, *, folder: Path, log: str, env: dict[str, str] | None = None
) -> Iterator[int]:
    """Run a program and its children on `core`; yield its pid, and terminate or kill it at the end."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with (folder / log).open("ab") as output:
        process = subprocess.Popen(
            ["taskset", "-c", str(core), *argv],
            cwd=folder,
            env=environment | (env or {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process.pid
    finally:
        family = tree(process.pid)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for one in family:
            with contextlib.suppress(psutil.Error):
                one.kill()


def wait_answer(
    port: int, path: str, *, pid: int, headers: dict[str, str] | None = None, body: bytes | None = None
) -> None:
    """Wait until a request gets 200."""
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            raise RuntimeError("it ended before it answered; its log says why")
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, headers or {})
        try:
            with urllib.request.urlopen(request, timeout=30):  # noqa: S310 - a fixed scheme
                return
        except (OSError, urllib.error.HTTPError):
            time.sleep(0.01)
    raise RuntimeError(f"no answer at {path} within {START_TIMEOUT:.0f} s")


def tree(pid: int) -> list[psutil.Process]:
    """Return `pid` and its descendants, without engines, which are not measured."""
    top = psutil.Process(pid)
    found = []
    for one in [top, *top.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            if one.name() != "engine":
                found.append(one)
    return found


@dataclass(frozen=True)
class Usage:
    """CPU seconds so far by process, and bytes of memory (proportional set size)."""

    cpu: dict[int, float]
    memory: dict[int, int]

    @classmethod
    def of(cls, processes: list[psutil.Process]) -> Usage:
        cpu, memory = {}, {}
        for one in processes:
            with contextlib.suppress(psutil.Error, OSError):
                fields = Path(f"/proc/{one.pid}/stat").read_text().rpartition(")")[2].split()
                cpu[one.pid] = (int(fields[11]) + int(fields[12])) / _TICK
                memory[one.pid] = int(one.memory_full_info().pss)
        return cls(cpu, memory)

    def since(self, before: Usage) -> dict[int, float]:
        """CPU seconds by process."""
        return {pid: seconds - before.cpu.get(pid, 0.0) for pid, seconds in self.cpu.items()}

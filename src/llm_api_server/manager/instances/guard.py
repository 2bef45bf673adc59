"""Runs one engine as its child and cleans up after it. A script: standard library only, one small process.

The manager starts one guard per instance, in a session of its own, and signals only the guard. The guard ends the
engine on SIGTERM. It ends the descendants of an engine that died (it is their subreaper), and it ends everything once
no manager has held the lock for ORPHAN_TIMEOUT seconds. It removes the shared memory that they leave: vLLM kills the
process that should. It survives the manager, so that the next one can adopt the engine. If the guard itself is killed,
the kernel kills the engine.

Usage: guard.py LOCK ORPHAN_TIMEOUT STOP_TIMEOUT -- COMMAND…       Exit code: the engine's, 128 + n for signal n.
       guard.py LOCK ORPHAN_TIMEOUT STOP_TIMEOUT --child PID       The engine is a child already (`zygote.py`).
"""

import contextlib
import ctypes
import fcntl
import os
import signal
import struct
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_CHECK_INTERVAL = 2.0
_SHARED_MEMORY = "/dev/shm/"  # noqa: S108 - shm_open(3) makes its files there
_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}
#: struct flock: type, whence, start, length, pid.
_FLOCK = struct.Struct("hhllixxxx")
#: The manager holds this open-file-description lock (fcntl(2)); guards can query its holder without taking it.
MANAGER_LOCK = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


def main(arguments: list[str]) -> int:
    lock, orphan_timeout, stop_timeout = Path(arguments[0]), float(arguments[1]), float(arguments[2])
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    is_forked = arguments[3] == "--child"
    child = int(arguments[4]) if is_forked else _spawn(libc, arguments[arguments.index("--") + 1 :])
    shared: set[str] = set()
    code = _watch(child, lock, orphan_timeout, stop_timeout, shared)
    shared |= _shared_memory(with_maps=True)
    _end_descendants()
    for name in shared:
        Path(name).unlink(missing_ok=True)
    return code


def _spawn(libc: ctypes.CDLL, command: list[str]) -> int:
    guard = os.getpid()
    child = os.fork()
    if child:
        return child
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != guard:
        os._exit(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"cannot start {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(127)


def _watch(child: int, lock: Path, orphan_timeout: float, stop_timeout: float, shared: set[str]) -> int:
    """Wait until the engine has ended, and end it on a signal or if orphaned. Return its exit code; add to `shared`."""
    managed_at = time.monotonic()
    kill_at: float | None = None
    while True:
        info = signal.sigtimedwait(_SIGNALS, _CHECK_INTERVAL)
        if (code := _reap(child)) is not None:
            return code
        shared |= _shared_memory(with_maps=info is not None)
        now = time.monotonic()
        if _is_locked(lock):
            managed_at = now
        is_signalled = info is not None and info.si_signo != signal.SIGCHLD
        if kill_at is None and (is_signalled or now - managed_at > orphan_timeout):
            _signal(child, signal.SIGTERM)
            kill_at = now + stop_timeout
        elif kill_at is not None and now >= kill_at:
            _signal(child, signal.SIGKILL)


def _reap(child: int) -> int | None:
    """Collect all ended descendants; return the exit code of `child` once it is among them."""
    code = None
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid == child:
                code = os.waitstatus_to_exitcode(status)
    return 128 - code if code is not None and code < 0 else code


def _is_locked(lock: Path) -> bool:
    """Return whether a manager holds the lock. Queries it only: taking the lock could keep a manager out."""
    try:
        with lock.open("r+b") as file:
            kind = _FLOCK.unpack(fcntl.fcntl(file, fcntl.F_OFD_GETLK, MANAGER_LOCK))[0]
    except OSError:
        return False
    return bool(kind != fcntl.F_UNLCK)


def _end_descendants() -> None:
    """Kill all descendants. Orphans of the engine become children of the guard, so the loop ends when none is left."""
    with contextlib.suppress(ChildProcessError):
        while True:
            for pid in _children(os.getpid()):
                _signal(pid, signal.SIGKILL)
            os.waitpid(-1, 0)


def _shared_memory(*, with_maps: bool) -> set[str]:
    """Return the files of shared memory that descendants have open, or mapped, which costs more to find out."""
    found = set()
    for pid in _descendants(os.getpid()):
        with contextlib.suppress(OSError):
            found |= {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()}
        if with_maps:
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines()
                found |= {line[line.index("/") :] for line in lines if _SHARED_MEMORY in line}
    return {name for name in found if name.startswith(_SHARED_MEMORY) and not name.endswith(" (deleted)")}


def _descendants(pid: int) -> list[int]:
    children = _children(pid)
    return [*children, *(below for child in children for below in _descendants(child))]


def _children(pid: int) -> list[int]:
    """Return the children of all threads: each thread has its own."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for file in Path(f"/proc/{pid}/task").glob("*/children"):
            found += map(int, file.read_text(encoding="ascii").split())
    return found


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Runs one engine as its child and leaves nothing of it behind. A script: standard library only, one small process.

The manager starts it in a session of its own, one per instance, and signals only it. It ends the engine when it is
told to (SIGTERM), ends what the engine leaves behind when that dies by itself (it is the subreaper of all
descendants), and ends everything when no manager has held the lock for `--orphan-timeout` seconds. It removes the
shared memory that they had and nobody removed: vLLM kills the process that should. It survives the manager, so that the
next one can adopt the engine. If it is killed itself, the kernel kills the engine.

Usage: guard.py LOCK ORPHAN_TIMEOUT STOP_TIMEOUT -- COMMAND…       Exit code: the engine's, 128 + n for signal n.
       guard.py LOCK ORPHAN_TIMEOUT STOP_TIMEOUT --child PID       The engine is our child already (`zygote.py`).
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
#: The manager holds this open-file-description lock (fcntl(2)), so that guards can ask for a holder without taking it.
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
    """Wait for the engine to end, and end it when asked to or orphaned. Answers its exit code; adds to `shared`."""
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
        is_told = info is not None and info.si_signo != signal.SIGCHLD
        if kill_at is None and (is_told or now - managed_at > orphan_timeout):
            _signal(child, signal.SIGTERM)
            kill_at = now + stop_timeout
        elif kill_at is not None and now >= kill_at:
            _signal(child, signal.SIGKILL)


def _reap(child: int) -> int | None:
    """Collect all ended descendants; the exit code of `child` once it is among them."""
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
    """Whether a manager lives. Asks for the lock's holder; taking the lock to test it could keep a manager out."""
    try:
        with lock.open("r+b") as file:
            kind = _FLOCK.unpack(fcntl.fcntl(file, fcntl.F_OFD_GETLK, MANAGER_LOCK))[0]
    except OSError:
        return False
    return bool(kind != fcntl.F_UNLCK)


def _end_descendants() -> None:
    """Kill what is left. Orphans of the engine become our children, so this ends when there is none."""
    with contextlib.suppress(ChildProcessError):
        while True:
            for pid in _children(os.getpid()):
                _signal(pid, signal.SIGKILL)
            os.waitpid(-1, 0)


def _shared_memory(*, with_maps: bool) -> set[str]:
    """Files of shared memory that our descendants have open, or, which costs more to tell, mapped."""
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
    """Of all its threads: each has its own."""
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

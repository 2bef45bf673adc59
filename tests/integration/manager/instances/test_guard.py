"""The guard with real processes: an engine ends on time and leaves nothing behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from llm_api_server.manager.instances import guard
from tests.waiting import wait_until

GUARD = Path(guard.__file__)
OBEYS = "import signal; print('up', flush=True); signal.pause()"
IGNORES = "import signal; signal.signal(15, signal.SIG_IGN); print('up', flush=True)\nwhile True: signal.pause()"
LEAVES_A_CHILD = (
    "import os, signal, sys\n"
    "if os.fork() == 0:\n"
    "    os.setsid(); print(os.getpid(), flush=True)\n"
    "    while True: signal.pause()\n"
    "signal.pause()"
)
Spawn = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[BinaryIO]:
    """The lock file, held as by a running manager until it is closed."""
    with (tmp_path / "manager.lock").open("w+b") as file:
        request = struct.pack("hhllixxxx", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, request)
        yield file


@pytest.fixture
def spawn(lock: BinaryIO) -> Iterator[Spawn]:
    guards: list[subprocess.Popen[str]] = []

    def start(code: str, *, lock: str = lock.name, orphan_timeout: float = 60, stop_timeout: float = 60) -> object:
        command = [sys.executable, "-I", "-S", str(GUARD), lock, str(orphan_timeout), str(stop_timeout)]
        child = subprocess.Popen(
            [*command, "--", sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        guards.append(child)
        return child

    yield start  # type: ignore[misc]
    for child in guards:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


def first_line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def engine_of(child: subprocess.Popen[str]) -> int:
    return int(Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text())


def is_alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def test_guard_exits_with_the_code_of_the_engine(spawn: Spawn) -> None:
    assert spawn("raise SystemExit(7)").wait() == 7


def test_death_by_signal_is_128_plus_its_number(spawn: Spawn) -> None:
    assert spawn("import os; os.kill(os.getpid(), 9)").wait() == 137


def test_command_that_cannot_start_is_reported(lock: BinaryIO) -> None:
    command = [sys.executable, "-I", "-S", str(GUARD), lock.name, "60", "60", "--", "/does/not/exist"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 127
    assert "cannot start /does/not/exist" in result.stderr


def test_sigterm_reaches_the_engine(spawn: Spawn) -> None:
    child = spawn(OBEYS)
    assert first_line(child) == "up"
    engine = engine_of(child)
    child.terminate()
    assert child.wait() == 128 + signal.SIGTERM
    assert not is_alive(engine)


def test_engine_that_ignores_sigterm_is_killed(spawn: Spawn) -> None:
    child = spawn(IGNORES, stop_timeout=0.1)
    assert first_line(child) == "up"
    child.terminate()
    assert child.wait() == 128 + signal.SIGKILL


def test_descendants_of_a_dead_engine_are_ended(spawn: Spawn) -> None:
    child = spawn(LEAVES_A_CHILD)
    left_behind = int(first_line(child))
    os.kill(engine_of(child), signal.SIGKILL)
    assert child.wait() == 128 + signal.SIGKILL
    assert not is_alive(left_behind)


def test_engine_dies_with_a_killed_guard(spawn: Spawn) -> None:
    child = spawn(OBEYS)
    assert first_line(child) == "up"
    engine = engine_of(child)
    child.kill()
    child.wait()
    wait_until(lambda: not is_alive(engine))


def test_engine_ends_if_no_manager_holds_the_lock(spawn: Spawn, tmp_path: Path) -> None:
    free = tmp_path / "free.lock"
    free.touch()
    child = spawn(OBEYS, lock=str(free), orphan_timeout=0.1)
    assert child.wait() == 128 + signal.SIGTERM


def test_engine_lives_exactly_as_long_as_the_lock_is_held(spawn: Spawn, lock: BinaryIO) -> None:
    """SIGCHLD makes the guard check the lock at once; two checks are further apart than the orphan timeout."""
    child = spawn(OBEYS, orphan_timeout=0.1)
    assert first_line(child) == "up"
    for _ in range(3):
        child.send_signal(signal.SIGCHLD)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(timeout=0.2)
    lock.close()
    assert child.wait() == 128 + signal.SIGTERM


@pytest.mark.parametrize("is_killed", [False, True], ids=["terminated", "killed"])
def test_abandoned_shared_memory_is_removed(spawn: Spawn, *, is_killed: bool) -> None:
    """vLLM abandons it when the process that would have removed it is killed."""
    code = (
        "import os, signal\n"
        "from multiprocessing import resource_tracker, shared_memory\n"
        "memory = shared_memory.SharedMemory(create=True, size=4096)\n"
        "os.kill(resource_tracker._resource_tracker._pid, signal.SIGKILL)\n"
        "if os.fork(): print(memory.name, os.getpid(), flush=True)\n"
        "signal.pause()"  # the child holds it when the engine is no more
    )
    child = spawn(code)
    assert child.stdout is not None
    name, pid = child.stdout.readline().split()
    file = Path("/dev/shm") / name  # noqa: S108
    assert file.exists()
    if is_killed:
        os.kill(int(pid), signal.SIGKILL)
    else:
        child.terminate()
    child.wait()
    assert not file.exists()

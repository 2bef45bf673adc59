"""Starts engines as forks of a zygote (`engines/vllm/zygote.py`), else as new processes. On the manager's loop.

The zygote starts with the first engine that can use it and ends with the manager; one that died is replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

from loguru import logger

from llm_api_server.engines import vllm
from llm_api_server.engines.base import LaunchPlan
from llm_api_server.manager.instances.adoption_records import AdoptionRecord
from llm_api_server.manager.instances.process import (
    GuardedProcess,
    LocalLauncher,
    Process,
    engine_environment,
    open_log,
)

_SCRIPT = Path(vllm.__file__).with_name("zygote.py")
_LARGEST_MESSAGE = 64 * 1024
#: Seconds that a fork may take; it usually takes hundredths of a second.
_FORK_TIMEOUT = 15.0
#: Seconds that the zygote may take to report the exit code of a guard.
_CODE_TIMEOUT = 2.0
_STOP_TIMEOUT = 5.0
#: Variables that may differ from the zygote's own: they are read when a device is first used, others at import.
_READ_LATE = frozenset({"CUDA_VISIBLE_DEVICES"})


class ForkFailed(Exception):
    """No engine was started. The message is the reason."""


class ZygoteLauncher:
    """`Launcher` that forks a plan if it `is_forkable`, and starts a new process if anything prevents the fork."""

    def __init__(self, local: LocalLauncher, log: Path) -> None:
        self._local = local
        self._log = log
        self._zygote: _Zygote | None = None
        #: Interpreters whose vLLM cannot be forked: another try would cost the imports again.
        self._unfit: set[str] = set()

    async def start(self, plan: LaunchPlan, log: Path) -> Process:
        if plan.is_forkable and plan.argv[0] not in self._unfit:
            try:
                return await self._fork(plan, log)
            except (ForkFailed, OSError) as error:
                logger.warning("vLLM is not forked but started as a new process: {}", error)
        return await self._local.start(plan, log)

    def adopt(self, record: AdoptionRecord) -> Process | None:
        return self._local.adopt(record)

    async def close(self) -> None:
        """End the zygote. Its forks belong to their guards and run on."""
        if self._zygote is not None:
            await self._zygote.close()

    @property
    def zygote_pid(self) -> int | None:
        return self._zygote.pid if self._zygote is not None and self._zygote.is_alive else None

    async def _fork(self, plan: LaunchPlan, log: Path) -> Process:
        environment = engine_environment(plan)
        zygote = await self._ready_zygote(plan, environment)
        if not zygote.serves(plan, environment):
            raise ForkFailed("its environment differs from that of the first vLLM model")
        request = {"argv": plan.argv[3:], "env": environment, "guard": self._local.guard_command()}
        exchange = asyncio.create_task(zygote.fork(request, log))
        try:
            return await asyncio.shield(exchange)
        except asyncio.CancelledError:
            exchange.add_done_callback(_terminate)
            raise

    async def _ready_zygote(self, plan: LaunchPlan, environment: dict[str, str]) -> _Zygote:
        """Return the running zygote, or start one, once its imports are done."""
        if self._zygote is None or not self._zygote.is_alive:
            if self._zygote is not None:
                logger.warning("the zygote has died; starting another")
                await self._zygote.close()
            self._zygote = _Zygote(plan, environment, self._log)
        zygote = self._zygote
        # Shielded: a load that is cancelled leaves the zygote to the next one.
        problem = await asyncio.shield(zygote.ready)
        if problem is not None:
            self._unfit.add(plan.argv[0])
            raise ForkFailed(problem)
        return zygote


class _Zygote:
    """One zygote process. `ready` returns None, or why its vLLM cannot be forked, or raises `ForkFailed`."""

    def __init__(self, plan: LaunchPlan, environment: dict[str, str], log: Path) -> None:
        self._python, self._module = plan.argv[0], plan.argv[2]
        self._environment = _read_at_import(environment)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(0)
        try:
            with open_log(log) as output:
                self._process = subprocess.Popen(
                    [self._python, "-P", str(_SCRIPT), str(theirs.fileno()), self._module],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                    umask=0o077,
                )
        except OSError:
            self._control.close()
            raise
        finally:
            theirs.close()
        self.pid = self._process.pid
        logger.info("zygote started (pid {})", self.pid)
        self.ready = asyncio.create_task(self._wait_ready())

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def serves(self, plan: LaunchPlan, environment: dict[str, str]) -> bool:
        is_same_program = (plan.argv[0], plan.argv[2]) == (self._python, self._module)
        return is_same_program and _read_at_import(environment) == self._environment

    async def fork(self, request: dict[str, Any], log: Path) -> Process:
        """Fork an engine. Raises `ForkFailed`, or `OSError` if the request cannot be sent."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs, open_log(log) as output:
                socket.send_fds(self._control, [json.dumps(request).encode()], [output, theirs.fileno()])
            async with asyncio.timeout(_FORK_TIMEOUT):
                reply, descriptors = await _receive(ours)
        except (OSError, TimeoutError) as error:
            ours.close()
            raise ForkFailed(f"the zygote does not respond ({error!r})") from error
        if not descriptors:
            ours.close()
            raise ForkFailed("the zygote closed the connection")
        return GuardedProcess(reply["pid"], _ExitCode(ours), pidfd=descriptors[0])

    async def close(self) -> None:
        """End it by closing its socket; kill it if it is busy importing."""
        self.ready.cancel()
        with contextlib.suppress(asyncio.CancelledError, ForkFailed, OSError):
            await self.ready
        self._control.close()
        if self.is_alive and not self.ready.cancelled():
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._process.wait, _STOP_TIMEOUT)
        if self.is_alive:
            self._process.send_signal(signal.SIGKILL)
        await asyncio.to_thread(self._process.wait)

    async def _wait_ready(self) -> str | None:
        message, _ = await _receive(self._control)
        if "ready" in message:
            logger.info("zygote ready after {:.1f} s", message["ready"])
            return None
        if "error" in message:
            return f"vLLM cannot be forked: {message['error']}"
        raise ForkFailed("the zygote died during its imports; see zygote.log")


class _ExitCode:
    """Reads the exit code of a guard from the zygote, its parent; None if the zygote has ended."""

    def __init__(self, report: socket.socket) -> None:
        self._report = report

    async def __call__(self) -> int | None:
        with self._report:
            try:
                async with asyncio.timeout(_CODE_TIMEOUT):
                    message, _ = await _receive(self._report)
            except (OSError, TimeoutError):
                return None
        code = message.get("code")
        return code if isinstance(code, int) else None


async def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Return one message and its descriptors; an empty message at the end of the connection."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(connection.fileno(), readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(connection.fileno())
    data, descriptors, _, _ = socket.recv_fds(connection, _LARGEST_MESSAGE, 1, socket.MSG_CMSG_CLOEXEC)
    return (json.loads(data) if data else {}), list(descriptors)


def _read_at_import(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in _READ_LATE}


def _terminate(exchange: asyncio.Task[Process]) -> None:
    """End an engine whose load was cancelled during the fork."""
    if not exchange.cancelled() and exchange.exception() is None:
        exchange.result().terminate()

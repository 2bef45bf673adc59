"""What is told to a running server from outside of it: reload, replace your processes, stop. Blocking.

Used by the command line, and by `serving.py` and `gunicorn_hooks.py` for its signals and its end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from loguru import logger

from llm_api_server.config.models import Config
from llm_api_server.errors import ControlError
from llm_api_server.ipc import client, messages
from llm_api_server.ipc.run_dir import RunDir
from llm_api_server.lifecycle.config_handover import RUN_DIR_VARIABLE
from llm_api_server.lifecycle.server_lock import ServerLock, try_lock

#: What the manager may take beyond `drain_timeout` to stop the engines.
_STOP_TIMEOUT = 30.0
_POLL_INTERVAL = 0.05
#: A worker or manager that follows another.
_START_TIMEOUT = 60.0
#: A manager reads the files of all models that changed.
_RELOAD_TIMEOUT = 120.0


def stop_manager(config: Config) -> bool:
    """Stop the manager and all engines; False when none was running. Returns when it is gone.

    Raises `ControlError` when it does not stop.
    """
    run_dir = RunDir(config.run_dir)
    timeout = config.server.drain_timeout + _STOP_TIMEOUT
    try:
        client.call(run_dir, messages.Shutdown(1), messages.Models, timeout=timeout)
    except ControlError as error:
        if is_absent(error):
            return False
        raise
    if not wait_released(run_dir.lock, timeout):
        raise ControlError(f"the manager did not stop within {timeout:.0f} s; its log says more")
    return True


def reload_server(config: Config, *, dry_run: bool = False) -> messages.Reloaded:
    """Have the running server follow its file as it is now; what changes. Raises `ControlError`."""
    command = messages.ReloadConfig(1, dry_run)
    return client.call(RunDir(config.run_dir), command, messages.Reloaded, timeout=_RELOAD_TIMEOUT)


def restart_server(config: Config, tell: Callable[[str], None]) -> None:
    """Replace the workers, one at a time, and the manager; engines and running requests go on. Raises `ControlError`.

    A server of one worker is that worker: then only its manager is replaced.
    """
    server = ServerLock(config.run_dir).holder()
    for pid in _status(config).workers:
        if pid == server:
            tell("There is one worker, which goes on as it is: more of them can be replaced (server.workers).")
            continue
        tell(f"Replacing the worker {pid} ...")
        _replace_worker(config, pid)
    before = _status(config)
    tell(f"Replacing the manager {before.manager} ...")
    command = messages.Shutdown(1, keeps_engines=True)
    client.call(RunDir(config.run_dir), command, messages.Models, timeout=_STOP_TIMEOUT)
    _wait_for(config, lambda now: now.manager != before.manager and {*before.workers} <= {*now.workers})


def _replace_worker(config: Config, pid: int) -> None:
    """Whoever started it starts another."""
    count = len(_status(config).workers)
    os.kill(pid, signal.SIGTERM)
    _wait_for(config, lambda now: pid not in now.workers and len(now.workers) >= count)


def _status(config: Config) -> messages.Status:
    return client.call(RunDir(config.run_dir), messages.GetStatus(1), messages.Status, timeout=_STOP_TIMEOUT)


def _wait_for(config: Config, is_so: Callable[[messages.Status], bool]) -> None:
    """Raises `ControlError` when the server does not get there."""
    end = time.monotonic() + config.server.drain_timeout + _START_TIMEOUT
    while time.monotonic() < end:
        with contextlib.suppress(ControlError):
            if is_so(_status(config)):
                return
        time.sleep(_POLL_INTERVAL)
    raise ControlError("the process that was to follow did not start in time; the server's log says more")


def begin_reload(config: Config) -> None:
    """What SIGHUP is for. In a thread: whoever gets the signal has other work. The manager logs what changes."""

    def reload() -> None:
        try:
            reload_server(config)
        except ControlError as error:
            if error.__cause__ is not None:  # else it is the manager's refusal, which has logged it
                logger.error("the configuration was not reloaded: {}", error)

    threading.Thread(target=reload, name="reload", daemon=True).start()


def join_run_dir(config: Config) -> None:
    """For whoever starts a server, before its first worker: workers will find their manager.

    One that a killed server left behind follows the file as it is now, or, where that cannot be, ends.
    """
    os.environ[RUN_DIR_VARIABLE] = str(config.run_dir)
    try:
        changes = reload_server(config).changes
    except ControlError as error:
        if is_absent(error):
            return
        changes = None
    if changes is None or any(change.effect == "restart" for change in changes):
        stop_manager(config)


def stop_server(config: Config) -> bool:
    """Stop the server with this configuration, and its manager if that runs alone; False when nothing was running.

    Raises `ControlError` when it does not stop.
    """
    lock = ServerLock(config.run_dir)
    pid = lock.holder()
    if pid is None:
        return stop_manager(config)
    try:
        os.kill(pid, signal.SIGTERM)
    except PermissionError as error:
        raise ControlError(f"the server (pid {pid}) belongs to another user") from error
    timeout = 2 * config.server.drain_timeout + 2 * _STOP_TIMEOUT
    if not wait_released(config.run_dir / "server.lock", timeout):
        raise ControlError(f"the server (pid {pid}) did not stop within {timeout:.0f} s")
    return True


def is_absent(error: ControlError) -> bool:
    """Whether the reason is that no manager runs, rather than that it refused or is stuck."""
    return isinstance(error.__cause__, FileNotFoundError | ConnectionRefusedError | NotADirectoryError)


def wait_released(path: Path, timeout: float) -> bool:
    """Wait until no process holds the lock file `path`; False after `timeout` seconds."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return True
        try:
            if try_lock(descriptor):
                return True
        finally:
            os.close(descriptor)
        time.sleep(_POLL_INTERVAL)
    return False

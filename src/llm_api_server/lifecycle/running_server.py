"""Commands to a running server from outside its processes: reload, restart, stop. Blocking."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from loguru import logger

from llm_api_server.errors import ControlError
from llm_api_server.ipc import client, messages
from llm_api_server.ipc.run_dir import RunDir
from llm_api_server.lifecycle.config_handover import RUN_DIR_VARIABLE
from llm_api_server.lifecycle.server_lock import ServerLock, try_lock

#: Seconds beyond `drain_timeout` that the manager may take to stop the engines.
_STOP_TIMEOUT = 30.0
_POLL_INTERVAL = 0.05
#: Seconds until the successor of a worker or manager must have started.
_START_TIMEOUT = 60.0
#: Seconds for a reload: the manager reads the files of all models that changed.
_RELOAD_TIMEOUT = 120.0


class RunningServer:
    """The server with a run directory, whether or not it runs now. Methods raise `ControlError` if a command fails."""

    def __init__(self, run_dir: Path, drain_timeout: float) -> None:
        self._path = run_dir
        self._run_dir = RunDir(run_dir)
        self._drain_timeout = drain_timeout

    def stop(self) -> bool:
        """Stop the server, or a manager that runs alone, and wait until it has ended; False if nothing was running."""
        pid = ServerLock(self._path).holder()
        if pid is None:
            return self.stop_manager()
        try:
            os.kill(pid, signal.SIGTERM)
        except PermissionError as error:
            raise ControlError(f"the server (pid {pid}) belongs to another user") from error
        timeout = 2 * self._drain_timeout + 2 * _STOP_TIMEOUT
        if not _wait_released(self._path / "server.lock", timeout):
            raise ControlError(f"the server (pid {pid}) did not stop within {timeout:.0f} s")
        return True

    def stop_manager(self) -> bool:
        """Stop the manager and all engines, and wait until it has ended; False if none was running."""
        timeout = self._drain_timeout + _STOP_TIMEOUT
        try:
            client.call(self._run_dir, messages.Shutdown(1), messages.Models, timeout=timeout)
        except ControlError as error:
            if is_absent(error):
                return False
            raise
        if not _wait_released(self._run_dir.lock, timeout):
            raise ControlError(f"the manager did not stop within {timeout:.0f} s; see its log")
        return True

    def reload(self, *, dry_run: bool = False) -> messages.Reloaded:
        """Apply the configuration file as it is now, unless `dry_run`, and return what changes."""
        command = messages.ReloadConfig(1, dry_run)
        return client.call(self._run_dir, command, messages.Reloaded, timeout=_RELOAD_TIMEOUT)

    def begin_reload(self) -> None:
        """Reload in a thread, for a signal handler. The manager logs what changes."""

        def reload() -> None:
            try:
                self.reload()
            except ControlError as error:
                if error.__cause__ is not None:  # otherwise the manager has refused, and logged why
                    logger.error("the configuration was not reloaded: {}", error)

        threading.Thread(target=reload, name="reload", daemon=True).start()

    def restart(self, report: Callable[[str], None]) -> None:
        """Replace the workers, one at a time, and then the manager. Engines and running requests go on.

        A server with one worker consists of that worker: then only its manager is replaced.
        """
        server = ServerLock(self._path).holder()
        for pid in self._status().workers:
            if pid == server:
                report("There is one worker, which continues as it is: only several can be replaced (server.workers).")
                continue
            report(f"Replacing the worker {pid} ...")
            self._replace_worker(pid)
        before = self._status()
        report(f"Replacing the manager {before.manager} ...")
        command = messages.Shutdown(1, keeps_engines=True)
        client.call(self._run_dir, command, messages.Models, timeout=_STOP_TIMEOUT)
        self._wait_for(lambda now: now.manager != before.manager and {*before.workers} <= {*now.workers})

    def join(self) -> None:
        """Prepare the run directory for the first worker of a server that starts.

        A manager that a killed server left behind reloads the file, or is stopped where it cannot follow it.
        """
        os.environ[RUN_DIR_VARIABLE] = str(self._path)
        try:
            changes = self.reload().changes
        except ControlError as error:
            if is_absent(error):
                return
            changes = None
        if changes is None or any(change.effect == "restart" for change in changes):
            self.stop_manager()

    def _replace_worker(self, pid: int) -> None:
        """End a worker, and wait until its parent process has started another."""
        count = len(self._status().workers)
        os.kill(pid, signal.SIGTERM)
        self._wait_for(lambda now: pid not in now.workers and len(now.workers) >= count)

    def _status(self) -> messages.Status:
        return client.call(self._run_dir, messages.GetStatus(1), messages.Status, timeout=_STOP_TIMEOUT)

    def _wait_for(self, is_done: Callable[[messages.Status], bool]) -> None:
        end = time.monotonic() + self._drain_timeout + _START_TIMEOUT
        while time.monotonic() < end:
            with contextlib.suppress(ControlError):
                if is_done(self._status()):
                    return
            time.sleep(_POLL_INTERVAL)
        raise ControlError("the successor of the process did not start in time; see the server's log")


def is_absent(error: ControlError) -> bool:
    """Return whether no manager runs, as opposed to one that refused or does not respond."""
    return isinstance(error.__cause__, FileNotFoundError | ConnectionRefusedError | NotADirectoryError)


def _wait_released(path: Path, timeout: float) -> bool:
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

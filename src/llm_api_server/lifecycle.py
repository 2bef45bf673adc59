"""A server's life seen from its parent process: the one lock per configuration, the port, the end of the manager.

Used by `serving.py`, `cli.py` and `gunicorn.conf.py`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from llm_api_server import calls, control
from llm_api_server.config import CONFIG_VARIABLE, Config, find_config, load_config
from llm_api_server.control import RunDir
from llm_api_server.engines.config_problems import engine_checks
from llm_api_server.errors import ConfigError, ControlError, ServerError
from llm_api_server.log import setup_logging

EXIT_FAILED = 1
EXIT_BAD_CONFIG = 2
BACKLOG = 2048
#: Longer than clients keep idle connections, so that it is they who close them.
KEEP_ALIVE_TIMEOUT = 75
#: What the manager may take beyond `drain_timeout` to stop the engines.
_STOP_TIMEOUT = 30.0
_POLL_INTERVAL = 0.05


class CannotServe(ServerError):
    """The server cannot start; the message says why and what to do."""


class ServerLock:
    """Held by the parent process of a running server; tells others its pid."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "server.lock"
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Raises `CannotServe` when another process holds it. The end of this process gives it back."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not _try_lock(descriptor):
            pid = self._read_pid(descriptor)
            os.close(descriptor)
            raise CannotServe(
                f"A server with this configuration is running already (pid {pid}). Stop it with `llm-api-server stop`, "
                "or give this one a configuration file of its own."
            )
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        self._descriptor = descriptor

    def holder(self) -> int | None:
        """The pid of the running server, or None. Not to be asked by the process that holds it."""
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            # A server that starts at this moment has not written its pid: 0 would be the caller's own process group.
            return None if _try_lock(descriptor) else self._read_pid(descriptor) or None
        finally:
            os.close(descriptor)

    @staticmethod
    def _read_pid(descriptor: int) -> int:
        return int(os.pread(descriptor, 20, 0) or b"0")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `CannotServe`."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host.strip("[]"), port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise CannotServe(_explain(error, host, port)) from error
    listener.set_inheritable(True)
    return listener


def stop_manager(config: Config) -> bool:
    """Stop the manager and all engines; False when none was running. Returns when it is gone.

    Raises `ControlError` when it does not stop.
    """
    run_dir = RunDir(config.run_dir)
    timeout = config.server.drain_timeout + _STOP_TIMEOUT
    try:
        calls.call(run_dir, control.Shutdown(1), timeout=timeout)
    except ControlError as error:
        if is_absent(error):
            return False
        raise
    if not wait_released(run_dir.lock, timeout):
        raise ControlError(f"the manager did not stop within {timeout:.0f} s; its log says more")
    return True


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
            if _try_lock(descriptor):
                return True
        finally:
            os.close(descriptor)
        time.sleep(_POLL_INTERVAL)
    return False


# ── gunicorn ─────────────────────────────────────────────────────────────────────────────────────────────────────


def config_for_gunicorn() -> Config:
    """The configuration, named to all workers, and its log. Ends the process with its problems if it has any."""
    path = find_config().absolute()
    os.environ[CONFIG_VARIABLE] = str(path)
    try:
        config = load_config(path, engine_checks(may_import=False))
        config.ensure_run_dir()
    except ConfigError as error:
        print(error, file=sys.stderr)  # noqa: T201 - there is no log before there is a configuration
        sys.exit(EXIT_BAD_CONFIG)
    setup_logging(config, "gateway")
    return config


def on_gunicorn_start(arbiter: Any, config: Config) -> None:
    """Before the master opens its socket. A master that takes over from another (USR2) finds the lock taken."""
    if arbiter.master_pid:
        return
    try:
        ServerLock(config.run_dir).acquire()
    except CannotServe as error:
        print(error, file=sys.stderr)  # noqa: T201 - the master's log is not open yet
        sys.exit(EXIT_FAILED)


def on_gunicorn_exit(arbiter: Any, config: Config) -> None:
    """After the last worker. While masters take over from each other (USR2) the manager stays."""
    if arbiter.reexec_pid or arbiter.master_pid:
        return
    try:
        stop_manager(config)
    except ControlError as error:
        print(error, file=sys.stderr)  # noqa: T201 - as above


def bind_address(config: Config) -> str:
    """`host:port` as gunicorn reads it."""
    host = config.server.host.strip("[]")
    return f"[{host}]:{config.server.port}" if ":" in host else f"{host}:{config.server.port}"


def gunicorn_logging() -> dict[str, Any]:
    """A `logconfig_dict` that leads gunicorn's own lines into our log."""
    quiet = {"level": "INFO", "handlers": []}
    return {
        "root": {"level": "NOTSET", "handlers": ["ours"]},
        "loggers": {"gunicorn.error": {**quiet, "propagate": True}, "gunicorn.access": {**quiet, "propagate": False}},
        "handlers": {"ours": {"class": "llm_api_server.log.InterceptHandler"}},
        "formatters": {},
    }


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _explain(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"Port {port} on {host} is in use by another program. Stop that (`llm-api-server stop` if it is this "
            "server), or choose another port: `--port` or server.port."
        )
    if error.errno == errno.EACCES:
        return f"This user may not listen on port {port}. Choose one above 1023: `--port` or server.port."
    return f"Cannot listen on {host}, port {port}: {error.strerror or error}. Check server.host."

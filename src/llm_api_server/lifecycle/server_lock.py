"""Lock, port and file descriptors that a server takes before its first worker starts."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import socket
from pathlib import Path

from llm_api_server.errors import ServerError

BACKLOG = 2048
#: Longer than clients keep idle connections, so that clients close them.
KEEP_ALIVE_TIMEOUT = 75
#: Each running request has a connection to its client and one to its engine.
_ENOUGH_DESCRIPTORS = 65536


class CannotServe(ServerError):
    """The server cannot start; the message has the reason and the remedy."""


class ServerLock:
    """Lock of the run directory, held by the parent process of a running server. Its file has the pid."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "server.lock"
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock until this process ends. Raises `CannotServe` if another process holds it."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not try_lock(descriptor):
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
        """Return the pid of the running server, or None. Must not be called in the process that holds the lock."""
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            # A server that starts at this moment has not written its pid, and 0 would be the caller's process group.
            return None if try_lock(descriptor) else self._read_pid(descriptor) or None
        finally:
            os.close(descriptor)

    def acquired_at(self) -> float:
        """Return the Unix time at which the last holder took the lock. Raises `OSError` if it was never taken."""
        return self._path.stat().st_mtime

    @staticmethod
    def _read_pid(descriptor: int) -> int:
        return int(os.pread(descriptor, 20, 0) or b"0")


def listen(host: str, port: int) -> socket.socket:
    """Return an inheritable listening socket. Raises `CannotServe`."""
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


def local_host(host: str) -> str:
    """Return the host by which this machine reaches a server that listens on `host`."""
    bare = host.strip("[]")
    return {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(bare, bare)  # noqa: S104 - not bound here


def local_url(host: str, port: int) -> str:
    """Return the URL by which this machine reaches a server that listens on `host` and `port`."""
    name = local_host(host)
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def raise_descriptor_limit() -> None:
    """Raise the limit of open files as far as this user may; child processes inherit it.

    The usual limit of 1,024 exists for programs that use select().
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def try_lock(descriptor: int) -> bool:
    """Take a POSIX record lock on the file; False if another process holds it."""
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

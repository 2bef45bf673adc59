"""A real server for tests: started by a user's command, on a free port, in a folder of its own."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from tests.waiting import wait_until

ROOT = Path(__file__).parent.parent
KEY = "sk-test-0123456789abcdef"
RESTRICTED_KEY = "sk-restricted-0123456789"
KEYS = [
    {"key": KEY, "name": "all", "permissions": ["all"]},
    {"key": RESTRICTED_KEY, "name": "restricted", "permissions": ["chat"]},
]
BIN = Path(sys.executable).parent
#: The TLS context of all HTTP clients of the tests: one for each client, as httpx makes it, takes 30 ms of CPU time.
TLS = ssl.create_default_context()

#: Commands that start a server, each from the folder of config.yaml.
COMMANDS = {
    "serve": [str(BIN / "llm-api-server"), "serve"],
    "main": [sys.executable, str(ROOT / "main.py")],
    "gunicorn": [str(BIN / "gunicorn"), "main:app", "-c", str(ROOT / "gunicorn.conf.py"), "--pythonpath", str(ROOT)],
}


#: Ports below the kernel's range for outgoing connections; each test process of pytest-xdist has a range of its own.
_PORTS = itertools.count(random.SystemRandom().randrange(1000))


def free_port() -> int:
    process = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = 20_000 + 1000 * (process % 12) + next(_PORTS) % 1000
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port


class Server:
    """A server. `config` is merged over a minimal configuration with two keys."""

    def __init__(self, folder: Path, config: dict[str, Any], *, command: str | list[str] = "serve") -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.run_dir = folder / "run"
        self._command = COMMANDS[command] if isinstance(command, str) else command
        self.configure(config)
        self.process: subprocess.Popen[bytes] | None = None

    def configure(self, config: dict[str, Any]) -> None:
        """Write the configuration file."""
        server = {"port": self.port, "run_dir": str(self.run_dir), **config.get("server", {})}
        auth = {"api_keys": KEYS, **config.get("auth", {})}
        # More threads would only wait for each other where tests share the cores.
        engines = config.get("engines", {})
        engines = {**engines, "llama_cpp": {"threads": 1, **engines.get("llama_cpp", {})}}
        text = yaml.safe_dump({**config, "server": server, "auth": auth, "engines": engines}, allow_unicode=True)
        (self.folder / "config.yaml").write_text(text, encoding="utf-8")

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run `llm-api-server` with these arguments."""
        command = [str(BIN / "llm-api-server"), *words]
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=120, check=False)

    def start(self) -> None:
        with (self.folder / "output.txt").open("ab") as output:
            self.process = subprocess.Popen(
                self._command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        while not self._is_ready():
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.output()}")
            time.sleep(0.05)

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=5, verify=TLS).status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> int:
        """Send SIGTERM, as systemd would, and return the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=180)

    def output(self) -> str:
        return (self.folder / "output.txt").read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """Return every live process that has this server's folder in its command line or works in it."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                is_ours = any(str(self.folder) in word for word in process.cmdline())
                if process.status() != psutil.STATUS_ZOMBIE and (is_ours or process.cwd() == str(self.folder)):
                    found.append(process)
        return found

    def engines(self) -> list[psutil.Process]:
        """Return the engine processes, without their guards."""
        return [p for p in self.processes() if "llama_cpp_server" in " ".join(_words(p)) and not _is_guard(p)]

    def manager(self) -> psutil.Process:
        """Return the manager. Several workers may start one; all but one of these find the lock taken and exit."""
        wait_until(lambda: len(self._managers()) == 1)
        (process,) = self._managers()
        return process

    def _managers(self) -> list[psutil.Process]:
        return [p for p in self.processes() if "llm_api_server.manager.main" in _words(p)]

    def downloads(self) -> list[psutil.Process]:
        """Return the download processes of the manager."""
        return [p for p in self.processes() if "pull" in _words(p)]

    def client(self, key: str = KEY, **options: Any) -> httpx.Client:
        """Return an HTTP client with a key."""
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, **{"timeout": 120, "verify": TLS, **options})

    def models(self) -> dict[str, dict[str, Any]]:
        """Return the models of the admin API by name."""
        with self.client() as client:
            response = client.get("/admin/api/models").raise_for_status().json()
        return {model["id"]: model for model in response["data"]}

    def has_manager(self) -> bool:
        """Return whether a manager responds. Requests may go on without one: a worker's lease outlives it."""
        with self.client() as client:
            return client.get("/admin/api/models").status_code == httpx.codes.OK

    def kill_all(self) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        if self.process is not None:
            self.process.wait()


@contextmanager
def running(folder: Path, config: dict[str, Any], *, command: str | list[str] = "serve") -> Iterator[Server]:
    """Run a server; afterwards check that it stopped in order and left no process."""
    server = Server(folder, config, command=command)
    try:
        server.start()
        yield server
        code = server.stop()
        wait_until(lambda: server.processes() == [], timeout=10)
        assert code == 0, server.output()
    except BaseException:
        sys.stderr.write(f"the end of the server's output:\n{server.output()[-4000:]}\n")
        raise
    finally:
        server.kill_all()


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, **more}


def _is_guard(process: psutil.Process) -> bool:
    return any(word.endswith("guard.py") for word in _words(process))


def _words(process: psutil.Process) -> list[str]:
    """Return the command line, empty if the process is gone."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []

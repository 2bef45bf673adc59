"""`llm-api-server serve`: runs the API workers with uvicorn until told to stop, then stops the manager."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Callable

import uvicorn
from loguru import logger
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from llm_api_server import __version__
from llm_api_server.auth.keys import key_of
from llm_api_server.config.checks import config_warnings, is_loopback
from llm_api_server.config.document import read_document
from llm_api_server.config.models import ApiKeyConfig, Config
from llm_api_server.engines.config_problems import engine_warnings
from llm_api_server.errors import ControlError
from llm_api_server.event_loop.accept_loop import WORKERS
from llm_api_server.gateway.http.fast_path import HttpProtocol
from llm_api_server.http_client import blocking
from llm_api_server.lifecycle.running_server import begin_reload, join_run_dir, stop_manager
from llm_api_server.lifecycle.server_lock import (
    BACKLOG,
    KEEP_ALIVE_TIMEOUT,
    ServerLock,
    listen,
    local_url,
    raise_descriptor_limit,
)
from llm_api_server.log import setup_logging
from llm_api_server.types import ExitCode

APP = "llm_api_server.gateway.app:create_app"
LOOP = "llm_api_server.event_loop.accept_loop:Loop"
#: A worker that answers its parent no sooner is replaced. A first import on a busy machine takes some seconds.
_WORKER_TIMEOUT = 60
_START_TIMEOUT = 120.0


def serve(config: Config) -> int:
    """Serve until SIGTERM or SIGINT; the exit code. Raises `CannotServe` before anything has been started."""
    ServerLock(config.ensure_run_dir()).acquire()
    listener = listen(config.server.host, config.server.port)
    raise_descriptor_limit()
    setup_logging(config, "gateway")
    for warning in (*config_warnings(config), *engine_warnings(config)):
        logger.warning("{}", warning)
    join_run_dir(config)
    port = int(listener.getsockname()[1])
    Banner(config, port, _print).start()
    try:
        return _run(config, _uvicorn_config(config), listener)
    finally:
        _stop(config)


class Banner(threading.Thread):
    """Waits until the server answers, then hands the lines for its user to `show`, once."""

    def __init__(self, config: Config, port: int, show: Callable[[str], None]) -> None:
        super().__init__(name="banner", daemon=True)
        self._config = config
        self._port = port
        self._show = show

    def run(self) -> None:
        try:
            url = f"{local_url(self._config.server.host, self._port)}/livez"
            with blocking.request("GET", url, timeout=_START_TIMEOUT) as response:
                response.read()
        except blocking.FAILURES:
            return  # it ended before it served; its log says why
        self._show(banner(self._config, self._port))


def banner(config: Config, port: int) -> str:
    """Address, and, where only this machine can connect, a key of the file and a request to try."""
    host = config.server.host
    url = local_url(host, port)
    workers = "" if config.server.workers == 1 else f", {config.server.workers} workers"
    lines = [f"LLM API Server {__version__} is ready: {url}/v1 (documentation: {url}/docs{workers})"]
    if not is_loopback(host):
        return "\n".join(lines)
    entry = _key_to_show(config)
    if entry is not None:
        lines.append(f"Key: {entry.key}")
    if request := _request_to_try(config, entry):
        path, body = request
        key = ["-H", f"Authorization: Bearer {entry.key}"] if entry else []
        command = ["curl", f"{url}{path}", "-H", "Content-Type: application/json", *key, "-d", json.dumps(body)]
        lines += ["Try it:", f"  {shlex.join(command)}"]
    return "\n".join(lines)


def _key_to_show(config: Config) -> ApiKeyConfig | None:
    """The first key that stands in the file itself: what came from the environment is not ours to print."""
    if not config.auth.enabled:
        return None
    expanded = read_document(config.source).expanded
    for index, entry in enumerate(config.auth.api_keys):
        if not entry.is_hashed and ("auth", "api_keys", index, "key") not in expanded:
            return entry
    return None


def _request_to_try(config: Config, entry: ApiKeyConfig | None) -> tuple[str, dict[str, object]] | None:
    """A path and body that `entry` may send, or None."""
    models = config.models
    name = models.default or next(iter(models.available), None)
    if name is None or (entry is None and config.auth.enabled):
        return None
    key = key_of(entry) if entry else None
    if key is not None and not (key.may("chat") and key.may_use(name)):
        return None
    if name in models.available and models.available[name].task == "embed":
        return None
    body = {"model": name, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 50}
    return "/v1/chat/completions", body


def _uvicorn_config(config: Config) -> uvicorn.Config:
    return uvicorn.Config(
        APP,
        factory=True,
        workers=config.server.workers,
        loop=LOOP,
        http=HttpProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        proxy_headers=bool(config.server.trusted_proxies),
        forwarded_allow_ips=config.server.trusted_proxies,
        timeout_keep_alive=KEEP_ALIVE_TIMEOUT,
        timeout_graceful_shutdown=math.ceil(config.server.drain_timeout),
        timeout_worker_healthcheck=_WORKER_TIMEOUT,
    )


class _Supervisor(Multiprocess):
    """Of several workers. uvicorn's own would replace them all on SIGHUP, and wait `_WORKER_TIMEOUT` for the answer of
    one that was killed while it was asked.
    """

    def __init__(self, config: Config, settings: uvicorn.Config, listener: socket.socket) -> None:
        super().__init__(settings, sockets=[listener])
        self._on_hangup = _on_hangup(config, self.should_exit.set)

    def handle_hup(self) -> None:
        self._on_hangup()

    def keep_subprocess_alive(self) -> None:
        for process in self.processes:
            process.child_conn.close()  # our copy of the worker's end: the pipe would not end with the worker
        super().keep_subprocess_alive()


def _on_hangup(config: Config, stop: Callable[[], None]) -> Callable[[], None]:
    """Reload; but where the terminal that we were started on is gone, end, as programs on a terminal do."""
    had_terminal = os.isatty(0)

    def on_hangup() -> None:
        if had_terminal and not os.isatty(0):
            stop()
        else:
            begin_reload(config)

    return on_hangup


def _run(config: Config, settings: uvicorn.Config, listener: socket.socket) -> int:
    os.environ[WORKERS] = str(settings.workers)
    if settings.workers > 1:
        supervisor = _Supervisor(config, settings, listener)
        supervisor.run()
        return ExitCode.FAILED if any(p.exitcode == STARTUP_FAILURE for p in supervisor.processes) else 0
    server = uvicorn.Server(settings)

    def on_signal(*_: object) -> None:
        # uvicorn raises a signal again when it has finished: it must not end this process before the manager.
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    on_hangup = _on_hangup(config, on_signal)
    signal.signal(signal.SIGHUP, lambda *_: on_hangup())
    try:
        server.run(sockets=[listener])
    except SystemExit:  # uvicorn's way to say that the app did not start; the log has the reason
        return ExitCode.FAILED
    return 0 if server.started else ExitCode.FAILED


def _stop(config: Config) -> None:
    try:
        stop_manager(config)
    except ControlError as error:
        logger.error("{}", error)
    logger.info("stopped")


def _print(text: str) -> None:
    sys.stdout.write(f"\n{text}\n\n")
    sys.stdout.flush()

"""`llm-api-server serve`: run the API workers with uvicorn until a signal, then stop the manager."""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
from collections.abc import Callable

import uvicorn
from loguru import logger
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from llm_api_server.config.checks import config_warnings
from llm_api_server.config.models import Config, ServerConfig
from llm_api_server.engines.config_problems import engine_warnings
from llm_api_server.errors import ControlError
from llm_api_server.event_loop.accept_loop import WORKERS
from llm_api_server.gateway.http.fast_path import HttpProtocol
from llm_api_server.lifecycle.running_server import RunningServer
from llm_api_server.lifecycle.server_lock import (
    BACKLOG,
    KEEP_ALIVE_TIMEOUT,
    ServerLock,
    listen,
    local_url,
    raise_descriptor_limit,
)
from llm_api_server.log import setup_logging
from llm_api_server.serving.banner import Banner, banner
from llm_api_server.types import ExitCode

APP = "llm_api_server.gateway.app:create_app"
LOOP = "llm_api_server.event_loop.accept_loop:Loop"
#: Seconds until a worker that does not respond is replaced. Its imports take some seconds on a busy machine.
_WORKER_TIMEOUT = 60


def serve(config: Config) -> int:
    """Serve until SIGTERM or SIGINT. Return the exit code. Raises `CannotServe` before anything is started."""
    ServerLock(config.ensure_run_dir()).acquire()
    listener = listen(config.server.host, config.server.port)
    raise_descriptor_limit()
    setup_logging(config, "gateway")
    for warning in (*config_warnings(config), *engine_warnings(config)):
        logger.warning("{}", warning)
    server = RunningServer(config.run_dir, config.server.drain_timeout)
    server.join()
    port = int(listener.getsockname()[1])
    Banner(local_url(config.server.host, port), lambda: _print(banner(config, port))).start()
    try:
        return _run(_uvicorn_config(config.server), listener, reload=server.begin_reload)
    finally:
        try:
            server.stop_manager()
        except ControlError as error:
            logger.error("{}", error)
        logger.info("stopped")


def _uvicorn_config(server: ServerConfig) -> uvicorn.Config:
    return uvicorn.Config(
        APP,
        factory=True,
        workers=server.workers,
        loop=LOOP,
        http=HttpProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        proxy_headers=bool(server.trusted_proxies),
        forwarded_allow_ips=server.trusted_proxies,
        timeout_keep_alive=KEEP_ALIVE_TIMEOUT,
        timeout_graceful_shutdown=math.ceil(server.drain_timeout),
        timeout_worker_healthcheck=_WORKER_TIMEOUT,
    )


def _run(settings: uvicorn.Config, listener: socket.socket, *, reload: Callable[[], None]) -> int:
    os.environ[WORKERS] = str(settings.workers)
    if settings.workers > 1:
        supervisor = _Supervisor(settings, listener, reload)
        supervisor.run()
        return ExitCode.FAILED if any(p.exitcode == STARTUP_FAILURE for p in supervisor.processes) else 0
    server = uvicorn.Server(settings)

    def stop(*_: object) -> None:
        # uvicorn's own handler raises the signal again at the end, and this process would end before the manager.
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    on_hangup = _hangup_handler(stop, reload)
    signal.signal(signal.SIGHUP, lambda *_: on_hangup())
    try:
        server.run(sockets=[listener])
    except SystemExit:  # raised by uvicorn if the app did not start; the log has the reason
        return ExitCode.FAILED
    return 0 if server.started else ExitCode.FAILED


class _Supervisor(Multiprocess):
    """Supervisor of several workers, changed in two ways: SIGHUP reloads instead of replacing all workers, and a worker
    that is killed during a health check is noticed at once instead of after `_WORKER_TIMEOUT`.
    """

    def __init__(self, settings: uvicorn.Config, listener: socket.socket, reload: Callable[[], None]) -> None:
        super().__init__(settings, sockets=[listener])
        self._on_hangup = _hangup_handler(self.should_exit.set, reload)

    def handle_hup(self) -> None:
        self._on_hangup()

    def keep_subprocess_alive(self) -> None:
        for process in self.processes:
            process.child_conn.close()  # this process's copy, which would keep the pipe open after the worker's end
        super().keep_subprocess_alive()


def _hangup_handler(stop: Callable[[], None], reload: Callable[[], None]) -> Callable[[], None]:
    """Return a handler of SIGHUP that reloads, or stops if the terminal the server was started on is gone."""
    had_terminal = os.isatty(0)

    def on_hangup() -> None:
        if had_terminal and not os.isatty(0):
            stop()
        else:
            reload()

    return on_hangup


def _print(text: str) -> None:
    sys.stdout.write(f"\n{text}\n\n")
    sys.stdout.flush()

"""Settings and hooks of `gunicorn.conf.py`. They run in the master process."""

from __future__ import annotations

import os
import sys
from typing import Any

from llm_api_server.config.load import CONFIG_VARIABLE, find_config, load_config
from llm_api_server.config.models import Config, ServerConfig
from llm_api_server.engines.config_problems import engine_checks
from llm_api_server.errors import ConfigError, ControlError
from llm_api_server.lifecycle.running_server import RunningServer
from llm_api_server.lifecycle.server_lock import CannotServe, ServerLock, raise_descriptor_limit
from llm_api_server.log import setup_logging
from llm_api_server.types import ExitCode


def config_for_gunicorn() -> Config:
    """Load the configuration, pass its path to the workers and set up the log. Exit if the configuration is wrong."""
    path = find_config().absolute()
    os.environ[CONFIG_VARIABLE] = str(path)
    try:
        config = load_config(path, engine_checks(may_import=False))
        config.ensure_run_dir()
    except ConfigError as error:
        print(error, file=sys.stderr)  # noqa: T201 - there is no log without a configuration
        sys.exit(ExitCode.WRONG)
    setup_logging(config, "gateway")
    return config


def on_gunicorn_start(arbiter: Any, config: Config) -> None:
    """Take the lock before the master opens its socket; a master that replaces another (USR2) finds it taken."""
    server = RunningServer(config.run_dir, config.server.drain_timeout)
    # gunicorn's own handler ends streams, and the server if the file is wrong.
    arbiter.handle_hup = server.begin_reload
    if arbiter.master_pid:
        return
    try:
        ServerLock(config.run_dir).acquire()
        raise_descriptor_limit()
        server.join()
    except (CannotServe, ControlError) as error:
        print(error, file=sys.stderr)  # noqa: T201 - the master's log is not open yet
        sys.exit(ExitCode.FAILED)


def on_gunicorn_exit(arbiter: Any, config: Config) -> None:
    """Stop the manager after the last worker, unless one master replaces another (USR2)."""
    if arbiter.reexec_pid or arbiter.master_pid:
        return
    try:
        RunningServer(config.run_dir, config.server.drain_timeout).stop_manager()
    except ControlError as error:
        print(error, file=sys.stderr)  # noqa: T201 - as above


def bind_address(server: ServerConfig) -> str:
    """Return `host:port` in gunicorn's syntax."""
    host = server.host.strip("[]")
    return f"[{host}]:{server.port}" if ":" in host else f"{host}:{server.port}"


def gunicorn_logging() -> dict[str, Any]:
    """Return a `logconfig_dict` that passes gunicorn's log to this server's."""
    quiet = {"level": "INFO", "handlers": []}
    return {
        "root": {"level": "NOTSET", "handlers": ["loguru"]},
        "loggers": {"gunicorn.error": {**quiet, "propagate": True}, "gunicorn.access": {**quiet, "propagate": False}},
        "handlers": {"loguru": {"class": "llm_api_server.log.InterceptHandler"}},
        "formatters": {},
    }

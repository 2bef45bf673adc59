"""What `gunicorn.conf.py` says: settings from the configuration, and what happens where the master starts and ends."""

from __future__ import annotations

import os
import sys
from typing import Any

from llm_api_server.config.load import CONFIG_VARIABLE, find_config, load_config
from llm_api_server.config.models import Config
from llm_api_server.engines.config_problems import engine_checks
from llm_api_server.errors import ConfigError, ControlError
from llm_api_server.lifecycle.running_server import begin_reload, join_run_dir, stop_manager
from llm_api_server.lifecycle.server_lock import CannotServe, ServerLock, raise_descriptor_limit
from llm_api_server.log import setup_logging
from llm_api_server.types import ExitCode


def config_for_gunicorn() -> Config:
    """The configuration, named to all workers, and its log. Ends the process with its problems if it has any."""
    path = find_config().absolute()
    os.environ[CONFIG_VARIABLE] = str(path)
    try:
        config = load_config(path, engine_checks(may_import=False))
        config.ensure_run_dir()
    except ConfigError as error:
        print(error, file=sys.stderr)  # noqa: T201 - there is no log before there is a configuration
        sys.exit(ExitCode.WRONG)
    setup_logging(config, "gateway")
    return config


def on_gunicorn_start(arbiter: Any, config: Config) -> None:
    """Before the master opens its socket. A master that takes over from another (USR2) finds the lock taken."""
    arbiter.handle_hup = lambda: begin_reload(config)  # gunicorn's own would end streams, and a bad file the server
    if arbiter.master_pid:
        return
    try:
        ServerLock(config.run_dir).acquire()
        raise_descriptor_limit()
        join_run_dir(config)
    except (CannotServe, ControlError) as error:
        print(error, file=sys.stderr)  # noqa: T201 - the master's log is not open yet
        sys.exit(ExitCode.FAILED)


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

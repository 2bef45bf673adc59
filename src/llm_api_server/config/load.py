"""Find the configuration file, read it, apply overrides from the environment and check it.

Loading collects every problem of the file before it raises. A loaded configuration never changes.
"""

from __future__ import annotations

import os
from pathlib import Path

from llm_api_server.config.checks import Checks, add_problems
from llm_api_server.config.document import KeyPath, read_document
from llm_api_server.config.models import Config
from llm_api_server.errors import ConfigError

#: Path of the configuration file. The command line sets it, and the overrides, for the processes it starts.
CONFIG_VARIABLE = "LLM_API_SERVER_CONFIG"
OVERRIDES: dict[str, KeyPath] = {
    "LLM_API_SERVER_HOST": ("server", "host"),
    "LLM_API_SERVER_PORT": ("server", "port"),
    "LLM_API_SERVER_WORKERS": ("server", "workers"),
    # Standard variables of OpenTelemetry SDKs.
    "OTEL_EXPORTER_OTLP_ENDPOINT": ("tracing", "endpoint"),
    "OTEL_SERVICE_NAME": ("tracing", "service_name"),
}


def find_config(given: Path | None = None) -> Path:
    """Return the file to read: `given`, else `CONFIG_VARIABLE`, else `config.yaml` in the current directory."""
    return given or Path(os.environ.get(CONFIG_VARIABLE) or "config.yaml")


def load_config(path: Path, extra_checks: Checks | None = None) -> Config:
    """Read and check the file. Raises `ConfigError` with every problem.

    `extra_checks` run after those of `checks.py`, such as the engines' own (`engines/config_problems.py`).
    """
    document = read_document(path)
    for variable, key_path in OVERRIDES.items():
        if value := os.environ.get(variable):
            document.override(key_path, value, f"environment variable {variable}")
    config = document.validate(Config).model_copy(update={"source": path.absolute()})
    add_problems(config, document, extra_checks or {})
    if document.problems:
        raise ConfigError(document.problems)
    return config


def config_from_environment() -> Config:
    """Load the file for a process that has no arguments of its own, such as a worker. Raises `ConfigError`."""
    return load_config(find_config())

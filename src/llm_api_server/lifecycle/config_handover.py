"""The configuration that a running server follows, handed from process to process: the file may be newer.

A worker that joins a server takes it from the manager, a manager from the worker that starts it.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import msgspec
from pydantic import ValidationError

from llm_api_server.config.document import read_document
from llm_api_server.config.load import config_from_environment
from llm_api_server.config.models import Config, ServerConfig
from llm_api_server.errors import ConfigError, ControlError
from llm_api_server.ipc import client, messages
from llm_api_server.ipc.run_dir import RunDir

#: The run directory of a server that starts or runs, for its workers.
RUN_DIR_VARIABLE = "LLM_API_SERVER_RUN_DIR"
#: Seconds that a running manager has to respond.
_CALL_TIMEOUT = 5.0


class _Packed(msgspec.Struct):
    source: str
    config: msgspec.Raw


def pack(config: Config) -> str:
    """Encode a configuration as JSON, with its secrets."""
    return msgspec.json.encode(_Packed(str(config.source), msgspec.Raw(config.model_dump_json().encode()))).decode()


def unpack(text: str | bytes) -> Config:
    packed = msgspec.json.decode(text, type=_Packed)
    config = Config.model_validate_json(bytes(packed.config))
    return config.model_copy(update={"source": Path(packed.source)})


def digest(packed: str) -> str:
    return hashlib.sha256(packed.encode()).hexdigest()


def joined_config() -> Config:
    """Return the configuration of the server that this worker joins, else that of the file. Raises `ConfigError`."""
    folder = os.environ.get(RUN_DIR_VARIABLE)
    running = running_config(Path(folder)) if folder else None
    return running or config_from_environment()


def running_config(run_dir: Path) -> Config | None:
    """Return the configuration of the server with this run directory; None if no manager responds."""
    try:
        response = client.call(RunDir(run_dir), messages.GetConfig(1), messages.CurrentConfig, timeout=_CALL_TIMEOUT)
    except ControlError:
        return None
    return unpack(response.config)


def likely_run_dir(path: Path) -> Path:
    """Return the run directory of the server with this configuration file, which itself may be invalid by now."""
    try:
        section = read_document(path).data["server"]
        server = ServerConfig.model_validate({"run_dir": section.get("run_dir")})
    except (ConfigError, ValidationError, AttributeError, KeyError, TypeError):
        server = ServerConfig()
    return Config(server=server).model_copy(update={"source": path.absolute()}).run_dir

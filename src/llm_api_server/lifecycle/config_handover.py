"""The configuration that a running server follows, as its processes hand it to each other: the file may be newer.

A worker that joins takes it from the manager, a manager from the worker that starts it.
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

#: The run directory of a server that is being started or runs, for its workers.
RUN_DIR_VARIABLE = "LLM_API_SERVER_RUN_DIR"
_ANSWER_TIMEOUT = 5.0


class _Packed(msgspec.Struct):
    source: str
    config: msgspec.Raw


def pack(config: Config) -> str:
    """As JSON, with its secrets."""
    return msgspec.json.encode(_Packed(str(config.source), msgspec.Raw(config.model_dump_json().encode()))).decode()


def unpack(text: str | bytes) -> Config:
    packed = msgspec.json.decode(text, type=_Packed)
    config = Config.model_validate_json(bytes(packed.config))
    return config.model_copy(update={"source": Path(packed.source)})


def digest(packed: str) -> str:
    return hashlib.sha256(packed.encode()).hexdigest()


def joined_config() -> Config:
    """For a worker: of the server that it joins, else of the file. Raises `ConfigError`."""
    folder = os.environ.get(RUN_DIR_VARIABLE)
    running = running_config(Path(folder)) if folder else None
    return running or config_from_environment()


def running_config(run_dir: Path) -> Config | None:
    """That of the server with this run directory; None where no manager answers."""
    try:
        answer = client.call(RunDir(run_dir), messages.GetConfig(1), messages.CurrentConfig, timeout=_ANSWER_TIMEOUT)
    except ControlError:
        return None
    return unpack(answer.config)


def likely_run_dir(path: Path) -> Path:
    """The run directory of the server with this file, which itself may be unusable by now."""
    try:
        section = read_document(path).data["server"]
        server = ServerConfig.model_validate({"run_dir": section.get("run_dir")})
    except (ConfigError, ValidationError, AttributeError, KeyError, TypeError):
        server = ServerConfig()
    return Config(server=server).model_copy(update={"source": path.absolute()}).run_dir

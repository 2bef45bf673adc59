"""The whole server as `llm-api-server status` shows it: asked of its manager, printed as one screen or JSON."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import msgspec

from llm_api_server import __version__, formats
from llm_api_server.cli import models as models_view
from llm_api_server.config.models import Config
from llm_api_server.devices.device import RAM
from llm_api_server.formats import memory_size
from llm_api_server.ipc import client
from llm_api_server.ipc.messages import GetStatus, Status
from llm_api_server.ipc.model_status import DeviceStatus, ModelStatus
from llm_api_server.ipc.run_dir import RunDir
from llm_api_server.lifecycle.config_handover import running_config
from llm_api_server.lifecycle.server_lock import ServerLock, local_url
from llm_api_server.redaction import one_line
from llm_api_server.times import as_duration
from llm_api_server.types import ModelState

RowT = TypeVar("RowT")

_ANSWER_TIMEOUT = 10.0


class StatusReport(msgspec.Struct):
    """`url` is None where the server chose its port itself, `pid` the process that was started, `started_at` when."""

    version: str
    url: str | None
    config: str
    pid: int | None
    manager: int
    workers: list[int]
    started_at: float | None
    in_flight: int
    queued: int
    models: list[ModelStatus]
    devices: list[DeviceStatus]


def fetch(config: Config) -> StatusReport:
    """As things are now. Raises `ControlError`."""
    models = models_view.fetch(config)
    answer = client.call(RunDir(config.run_dir), GetStatus(1), Status, timeout=_ANSWER_TIMEOUT)
    followed = running_config(config.run_dir) or config
    lock = ServerLock(config.run_dir)
    pid = lock.holder()
    return StatusReport(
        version=answer.version,
        url=local_url(followed.server.host, followed.server.port) if followed.server.port else None,
        config=str(followed.source),
        pid=pid,
        manager=answer.manager,
        workers=answer.workers,
        started_at=lock.acquired_at() if pid is not None else None,
        in_flight=sum(model.in_flight for model in models),
        queued=sum(model.queued for model in models),
        models=models,
        devices=answer.devices,
    )


def as_json(status: StatusReport) -> str:
    return msgspec.json.format(msgspec.json.encode(status), indent=2).decode()


def as_text(status: StatusReport) -> str:
    """The server, then a line for each model and device, then why models failed."""
    parts = ["\n".join(_server_lines(status))]
    if status.models:
        parts.append(_table(_MODEL_COLUMNS, status.models))
    else:
        parts.append("No models are configured: add one to models.available.")
    if status.devices:
        parts.append(_table(_DEVICE_COLUMNS, status.devices))
    if reasons := models_view.failures(status.models):
        parts.append("\n".join(reasons))
    return "\n\n".join(parts)


def _server_lines(status: StatusReport) -> list[str]:
    where = f"{status.url}/v1" if status.url else "a port that it chose itself (server.port: 0)"
    up = f", up {as_duration(time.time() - status.started_at)}" if status.started_at is not None else ""
    workers = " ".join(map(str, sorted(status.workers))) or "none: nobody can connect, and the manager will end"
    lines = [
        f"LLM API Server {status.version} at {where}{up}",
        f"configuration: {status.config}",
        f"processes: manager {status.manager}, workers {workers}",
        f"requests: {status.in_flight} in flight, {status.queued} waiting",
    ]
    if status.version != __version__:
        lines.append(f"Version {__version__} is installed: `llm-api-server restart` changes to it.")
    return lines


def _table(columns: dict[str, Callable[[RowT], str]], rows: list[RowT]) -> str:
    return formats.as_table([list(columns), *([show(row) for show in columns.values()] for row in rows)])


def _state(model: ModelStatus) -> str:
    if model.state is not ModelState.STARTING:
        return str(model.state)
    parts = [model.phase] if model.phase else []
    if model.ready_at is not None and (left := model.ready_at - time.time()) > 0:
        parts.append(f"about {left:.0f} s left")
    return f"{model.state} ({', '.join(parts)})" if parts else str(model.state)


def _memory(model: ModelStatus) -> str:
    """GPUs by the books; of RAM what its processes really have."""
    parts = [f"{memory_size(size)} {device}" for device, size in model.devices.items() if device != RAM]
    if model.memory_bytes:
        parts.append(f"{memory_size(model.memory_bytes)} ram")
    return ", ".join(parts) or "-"


_MODEL_COLUMNS: dict[str, Callable[[ModelStatus], str]] = {
    "MODEL": lambda model: one_line(model.id),
    "STATE": _state,
    "IN FLIGHT": lambda model: str(model.in_flight),
    "QUEUED": lambda model: str(model.queued),
    "MEMORY": _memory,
}
_DEVICE_COLUMNS: dict[str, Callable[[DeviceStatus], str]] = {
    "DEVICE": lambda device: device.id,
    "NAME": lambda device: one_line(device.name),
    "TOTAL": lambda device: memory_size(device.total),
    "MODELS": lambda device: memory_size(sum(device.taken.values())),
    "OTHER PROGRAMS": lambda device: memory_size(device.foreign),
    "FREE FOR MODELS": lambda device: memory_size(device.free),
}

"""Command `status`: the running server on one screen."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from llm_api_server import __version__, formats
from llm_api_server.cli import base, models
from llm_api_server.cli.base import ConfigOption, JsonOption
from llm_api_server.formats import memory_size
from llm_api_server.redaction import one_line
from llm_api_server.times import as_duration
from llm_api_server.types import ExitCode, ModelState

if TYPE_CHECKING:
    from llm_api_server.config.models import Config
    from llm_api_server.ipc.model_status import DeviceStatus, ModelStatus

RowT = TypeVar("RowT")

_WATCH_INTERVAL = 1.0


@dataclass
class StatusReport:
    """Content of the screen, and of the JSON output.

    `url` is None if the server chose its own port. `pid` is the process that was started, `started_at` its start.
    """

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


def status(
    *,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Refresh every second until Ctrl-C.")] = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Show the running server on one screen: processes, requests, models, memory."""
    if watch and as_json:
        base.fail("Give --watch or --json, not both.", ExitCode.WRONG)
    with base.running_server(config) as loaded:
        report = fetch(loaded)
        if watch:
            _watch(loaded)
        else:
            base.show(as_text(report), report, as_json=as_json)


def _watch(config: Config) -> None:
    """Redraw the screen until Ctrl-C, also while the manager is away during a restart."""
    from contextlib import suppress

    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from llm_api_server.errors import ControlError

    console = Console()
    if not console.is_terminal:
        base.fail("--watch needs a terminal; use --json without one.", ExitCode.WRONG)
    with suppress(KeyboardInterrupt), Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            try:
                text = as_text(fetch(config))
            except ControlError as error:
                text = f"The server does not respond: {error}"
            live.update(Text(f"{text}\n\nCtrl-C ends.", no_wrap=True, overflow="ellipsis"), refresh=True)
            time.sleep(_WATCH_INTERVAL)


def fetch(config: Config) -> StatusReport:
    """Return the current state of the server. Raises `ControlError`."""
    from llm_api_server.ipc.messages import GetStatus, Status
    from llm_api_server.lifecycle.config_handover import running_config
    from llm_api_server.lifecycle.server_lock import ServerLock, local_url

    statuses = models.fetch(config.run_dir)
    response = base.call_manager(config.run_dir, GetStatus(1), Status)
    followed = running_config(config.run_dir) or config
    lock = ServerLock(config.run_dir)
    pid = lock.holder()
    return StatusReport(
        version=response.version,
        url=local_url(followed.server.host, followed.server.port) if followed.server.port else None,
        config=str(followed.source),
        pid=pid,
        manager=response.manager,
        workers=response.workers,
        started_at=lock.acquired_at() if pid is not None else None,
        in_flight=sum(model.in_flight for model in statuses),
        queued=sum(model.queued for model in statuses),
        models=statuses,
        devices=response.devices,
    )


def as_text(report: StatusReport) -> str:
    """Return the server's lines, a table of models, a table of devices, and why models failed."""
    parts = ["\n".join(_server_lines(report))]
    if report.models:
        parts.append(_table(_MODEL_COLUMNS, report.models))
    else:
        parts.append("No models are configured: add one to models.available.")
    if report.devices:
        parts.append(_table(_DEVICE_COLUMNS, report.devices))
    if reasons := models.failures(report.models):
        parts.append("\n".join(reasons))
    return "\n\n".join(parts)


def _server_lines(report: StatusReport) -> list[str]:
    where = f"{report.url}/v1" if report.url else "a port that it chose itself (server.port: 0)"
    up = f", up {as_duration(time.time() - report.started_at)}" if report.started_at is not None else ""
    workers = " ".join(map(str, sorted(report.workers))) or "none: clients cannot connect, and the manager will exit"
    lines = [
        f"LLM API Server {report.version} at {where}{up}",
        f"configuration: {report.config}",
        f"processes: manager {report.manager}, workers {workers}",
        f"requests: {report.in_flight} in flight, {report.queued} waiting",
    ]
    if report.version != __version__:
        lines.append(f"Version {__version__} is installed: `llm-api-server restart` switches to it.")
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
    """Return the reserved memory of each GPU, and the RAM that the processes really use."""
    from llm_api_server.devices.device import RAM

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

"""Commands `models …` that list, load and pin the models of the running server; completion of model names."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from llm_api_server import formats
from llm_api_server.cli import base
from llm_api_server.cli.base import ConfigOption, JsonOption
from llm_api_server.formats import memory_size
from llm_api_server.redaction import one_line
from llm_api_server.types import ModelState

if TYPE_CHECKING:
    from pathlib import Path

    from llm_api_server.ipc.model_status import DeviceStatus, Explanation, ModelStatus

_MEBIBYTE = 1024 * 1024


def complete_name(context: typer.Context, incomplete: str) -> list[str]:
    """Return names, aliases and adapters from the configuration file; none if it cannot be read. Calls no server."""
    import os
    from pathlib import Path

    import yaml

    path = context.params.get("config") or os.environ.get("LLM_API_SERVER_CONFIG") or "config.yaml"
    try:
        with Path(path).open(encoding="utf-8") as file:
            available = yaml.load(file, yaml.CSafeLoader)["models"]["available"]
        names: list[str] = []
        for name, entry in available.items():
            names += [name, *((entry or {}).get("aliases") or []), *((entry or {}).get("adapters") or [])]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, KeyError, TypeError):
        return []
    return [name for name in names if str(name).startswith(incomplete)]


NameArgument = Annotated[str, typer.Argument(help="Name or alias of a model.", autocompletion=complete_name)]
app = typer.Typer(help="Models of the running server.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def models_list(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """List all models and their states."""
    with base.running_server(config) as loaded:
        statuses = fetch(loaded.run_dir)
        base.show(as_table(statuses), statuses, as_json=as_json)


@app.command("show")
def models_show(name: NameArgument, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show everything about one model."""
    with base.running_server(config) as loaded:
        status = find(fetch(loaded.run_dir), name)
        base.show(as_lines(status), status, as_json=as_json)


@app.command("explain")
def models_explain(name: NameArgument, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Explain whether a model fits: now, after unloading others, or never. Shows the arithmetic."""
    from llm_api_server.ipc.messages import Explained, ExplainModel

    with base.running_server(config) as loaded:
        command = ExplainModel(1, find(fetch(loaded.run_dir), name).id)
        explanation = base.call_manager(loaded.run_dir, command, Explained).explanation
        base.show(explanation_text(explanation), explanation, as_json=as_json)


@app.command("load")
def models_load(name: NameArgument, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Load a model and wait until it is ready."""
    from llm_api_server.errors import ControlError
    from llm_api_server.ipc.messages import LoadModel, Models

    with base.running_server(config) as loaded:
        command = LoadModel(1, find(fetch(loaded.run_dir), name).id)
        # Waiting in the queue has no time limit; the manager limits the load itself.
        status = find(base.call_manager(loaded.run_dir, command, Models, timeout=None).models, name)
        if status.state is ModelState.FAILED:
            raise ControlError(f"{status.id} could not be loaded: {status.error or 'no reason given'}")
        base.show(f"{status.id}: {status.state}", status, as_json=as_json)


@app.command("unload")
def models_unload(name: NameArgument, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Unload a model once its requests have finished, and wait until it is gone."""
    with base.running_server(config) as loaded:
        status = _unload(loaded.run_dir, name)
        base.show(f"{status.id}: {status.state}", status, as_json=as_json)


@app.command("pin")
def models_pin(name: NameArgument, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Pin a loaded model: others cannot evict it, and it stays loaded when idle. Unloading it unpins it."""
    _pin(name, config, is_pinned=True, as_json=as_json)


@app.command("unpin")
def models_unpin(name: NameArgument, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Unpin a model: others may evict it, and it may be unloaded when idle."""
    _pin(name, config, is_pinned=False, as_json=as_json)


def fetch(run_dir: Path) -> list[ModelStatus]:
    """Return the status of all models. Raises `ControlError`."""
    from llm_api_server.ipc.messages import ListModels, Models

    return base.call_manager(run_dir, ListModels(1), Models).models


def find(statuses: Sequence[ModelStatus], name: str) -> ModelStatus:
    """Return the model with this name or alias, or with an adapter of this name. Raises `ControlError`."""
    from llm_api_server.errors import ControlError

    for status in statuses:
        if name in {status.id, *status.aliases, *status.adapters}:
            return status
    names = ", ".join(status.id for status in statuses) or "none"
    raise ControlError(f"There is no model '{name}'. Models: {names}.")


def _unload(run_dir: Path, name: str) -> ModelStatus:
    from llm_api_server.ipc.messages import Models, UnloadModel
    from llm_api_server.ipc.model_status import ModelStatus

    before = find(fetch(run_dir), name)
    after = base.call_manager(run_dir, UnloadModel(1, before.id), Models, timeout=None).models
    if before.twin_of is not None and all(status.id != before.id for status in after):
        # Stopped embedding instances are not listed.
        return ModelStatus(before.id, ModelState.STOPPED, before.engine, before.path)
    return find(after, name)


def _pin(name: str, path: Path | None, *, is_pinned: bool, as_json: bool) -> None:
    from llm_api_server.ipc.messages import Models, PinModel

    with base.running_server(path) as config:
        command = PinModel(1, find(fetch(config.run_dir), name).id, is_pinned)
        after = base.call_manager(config.run_dir, command, Models).models
        status = find(after, name)
        base.show(f"{status.id}: {'pinned' if is_pinned else 'not pinned'}", status, as_json=as_json)


_COLUMNS: dict[str, Callable[[ModelStatus], str]] = {
    "MODEL": lambda status: status.id,
    "STATE": lambda status: f"{status.state}, pinned" if status.pinned else str(status.state),
    "ENGINE": lambda status: status.engine,
    "PID": lambda status: _or_dash(status.pid),
    "MEMORY": lambda status: _or_dash(status.memory_bytes and f"{status.memory_bytes / _MEBIBYTE:.0f} MiB"),
    "IN FLIGHT": lambda status: str(status.in_flight),
    "QUEUED": lambda status: str(status.queued),
    "CONTEXT": lambda status: _or_dash(status.context_length),
}


def as_table(statuses: Sequence[ModelStatus]) -> str:
    """Return one line per model, then one per failure."""
    if not statuses:
        return "No models are configured: add one to models.available."
    rows = [list(_COLUMNS), *([show(status) for show in _COLUMNS.values()] for status in statuses)]
    reasons = failures(statuses)
    return "\n".join([formats.as_table(rows), *([""] if reasons else []), *reasons])


def failures(statuses: Sequence[ModelStatus]) -> list[str]:
    """Return a line for each model that failed."""
    return [f"{status.id}: {_reason(status)}" for status in statuses if status.error]


def as_lines(status: ModelStatus) -> str:
    """Return one line for each field that has a value."""
    import msgspec

    devices = ", ".join(f"{device} {memory_size(size)}" for device, size in status.devices.items())
    phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in status.phases.items())
    return formats.as_lines(
        {
            **msgspec.to_builtins(status),
            "last_used": _local_time(status.last_used),
            "loaded_at": _local_time(status.loaded_at),
            "error": _reason(status) if status.error else None,
            "retry_at": _local_time(status.retry_at),
            "devices": devices or None,
            "tasks": ", ".join(status.tasks or ()) or None,
            "phases": phases or None,
        }
    )


def explanation_text(explanation: Explanation) -> str:
    """Return the verdict, and the arithmetic of each device."""
    lines = [f"{explanation.model}: {explanation.message}"]
    if explanation.needs and explanation.needs not in explanation.message:
        lines.append(f"It needs {explanation.needs}.")
    lines.append(
        f"Models that may be loaded (models.max_loaded): {explanation.places}, {explanation.places_free} free."
    )
    return "\n".join([*lines, *(_device_line(device) for device in explanation.devices)])


def _device_line(device: DeviceStatus) -> str:
    parts = [f"{memory_size(device.total)} in total"]
    if device.limit != device.total:
        parts.append(f"{memory_size(device.limit)} for models")
    parts += [f"{memory_size(size)} {model}" for model, size in device.taken.items()]
    if device.foreign:
        parts.append(f"{memory_size(device.foreign)} other programs")
    name = f" ({device.name})" if device.name.lower() != device.id else ""
    return f"{device.id}{name}: {', '.join(parts)}; {memory_size(device.free)} free"


def _reason(status: ModelStatus) -> str:
    retry = "" if status.retry_at is None else f" (a request after {_local_time(status.retry_at)} tries again)"
    return f"{one_line(status.error or '')}{retry}"


def _local_time(seconds: float | None) -> str | None:
    return None if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _or_dash(value: object) -> str:
    return str(value) if value else "-"

"""Models as the command line shows them: asked of the running manager, printed as table, lines or JSON."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import msgspec

from llm_api_server import formats
from llm_api_server.config.models import Config
from llm_api_server.errors import ControlError
from llm_api_server.formats import memory_size
from llm_api_server.ipc import client
from llm_api_server.ipc.messages import Explained, ExplainModel, ListModels, LoadModel, Models, PinModel, UnloadModel
from llm_api_server.ipc.model_status import DeviceStatus, Explanation, ModelStatus
from llm_api_server.ipc.run_dir import RunDir
from llm_api_server.redaction import one_line
from llm_api_server.types import ModelState

_ANSWER_TIMEOUT = 10.0
_MEBIBYTE = 1024 * 1024

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


def fetch(config: Config) -> list[ModelStatus]:
    """All models. Raises `ControlError`."""
    return client.call(RunDir(config.run_dir), ListModels(1), Models, timeout=_ANSWER_TIMEOUT).models


def find(statuses: Sequence[ModelStatus], name: str) -> ModelStatus:
    """The model with this name or alias, or with an adapter of this name. Raises `ControlError`."""
    for status in statuses:
        if name in {status.id, *status.aliases, *status.adapters}:
            return status
    names = ", ".join(status.id for status in statuses) or "none"
    raise ControlError(f"There is no model '{name}'. Models: {names}.")


def load(config: Config, name: str) -> ModelStatus:
    """Load and wait. Raises `ControlError` with the engine's reason when the model fails."""
    command = LoadModel(1, find(fetch(config), name).id)
    # The queue before a load has no limit of its own; the manager ends the load itself.
    status = find(client.call(RunDir(config.run_dir), command, Models, timeout=None).models, name)
    if status.state is ModelState.FAILED:
        raise ControlError(f"{status.id} could not be loaded: {status.error or 'no reason given'}")
    return status


def unload(config: Config, name: str) -> ModelStatus:
    """Unload and wait. Raises `ControlError`."""
    before = find(fetch(config), name)
    after = client.call(RunDir(config.run_dir), UnloadModel(1, before.id), Models, timeout=None).models
    if before.twin_of is not None and all(status.id != before.id for status in after):
        return ModelStatus(before.id, ModelState.STOPPED, before.engine, before.path)  # stopped twins are not listed
    return find(after, name)


def pin(config: Config, name: str, *, is_pinned: bool) -> ModelStatus:
    """Raises `ControlError` where it is not loaded."""
    command = PinModel(1, find(fetch(config), name).id, is_pinned)
    return find(client.call(RunDir(config.run_dir), command, Models, timeout=_ANSWER_TIMEOUT).models, name)


def explain(config: Config, name: str) -> Explanation:
    """Whether it would fit. Raises `ControlError`."""
    command = ExplainModel(1, find(fetch(config), name).id)
    return client.call(RunDir(config.run_dir), command, Explained, timeout=_ANSWER_TIMEOUT).explanation


def as_json(content: ModelStatus | Sequence[ModelStatus] | Explanation) -> str:
    return msgspec.json.format(msgspec.json.encode(content), indent=2).decode()


def as_text(explanation: Explanation) -> str:
    """The verdict, and the arithmetic of each device."""
    lines = [f"{explanation.model}: {explanation.message}"]
    if explanation.needs and explanation.needs not in explanation.message:
        lines.append(f"It needs {explanation.needs}.")
    lines.append(f"Places (models.max_loaded): {explanation.places}, {explanation.places_free} of them free.")
    return "\n".join([*lines, *(_device_line(device) for device in explanation.devices)])


def _device_line(device: DeviceStatus) -> str:
    parts = [f"{memory_size(device.total)} in all"]
    if device.limit != device.total:
        parts.append(f"{memory_size(device.limit)} for models")
    parts += [f"{memory_size(size)} {model}" for model, size in device.taken.items()]
    if device.foreign:
        parts.append(f"{memory_size(device.foreign)} other programs")
    name = f" ({device.name})" if device.name.lower() != device.id else ""
    return f"{device.id}{name}: {', '.join(parts)}; {memory_size(device.free)} free"


def as_table(statuses: Sequence[ModelStatus]) -> str:
    """One line per model; below, why models have failed."""
    if not statuses:
        return "No models are configured: add one to models.available."
    rows = [list(_COLUMNS), *([show(status) for show in _COLUMNS.values()] for status in statuses)]
    reasons = failures(statuses)
    return "\n".join([formats.as_table(rows), *([""] if reasons else []), *reasons])


def failures(statuses: Sequence[ModelStatus]) -> list[str]:
    """Why models have failed, a line for each."""
    return [f"{status.id}: {_reason(status)}" for status in statuses if status.error]


def as_lines(status: ModelStatus) -> str:
    """Every field that has a value, one per line."""
    fields = {
        **msgspec.to_builtins(status),
        "last_used": _clock(status.last_used),
        "loaded_at": _clock(status.loaded_at),
    }
    fields |= {"error": _reason(status) if status.error else None, "retry_at": _clock(status.retry_at)}
    fields["devices"] = ", ".join(f"{device} {memory_size(size)}" for device, size in status.devices.items()) or None
    fields["tasks"] = ", ".join(status.tasks or ()) or None
    fields["phases"] = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in status.phases.items()) or None
    return formats.as_lines(fields)


def _reason(status: ModelStatus) -> str:
    again = "" if status.retry_at is None else f" (a request after {_clock(status.retry_at)} tries again)"
    return f"{one_line(status.error or '')}{again}"


def _clock(seconds: float | None) -> str | None:
    return None if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _or_dash(value: object) -> str:
    return str(value) if value else "-"

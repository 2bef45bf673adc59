"""The contract between API workers, the command line and the manager: every message that either side may send.

One unix stream socket in the run directory, framed by `framing.py`. Workers keep one connection open; the command line
opens one per command. Leases, quota and downloads have modules of their own; this one has the greeting, keys, usage,
configuration, commands, and the unions of all messages.

Field names and tags are a wire format between versions: `rename` keeps the encoded name of a renamed field.
"""

from __future__ import annotations

import msgspec

from llm_api_server.auth.access import Key
from llm_api_server.config.change import Change
from llm_api_server.ipc.download_messages import DownloadCommand, DownloadStatuses, Removed
from llm_api_server.ipc.framing import FrameDecoder
from llm_api_server.ipc.lease_messages import (
    Acquire,
    Cancel,
    Granted,
    PrefillDone,
    Queued,
    ReportInFlight,
    ReturnSlots,
    RevokeSlots,
)
from llm_api_server.ipc.model_status import DeviceStatus, Explanation, ModelStatus
from llm_api_server.ipc.quota_messages import (
    Admit,
    Admitted,
    AdmittedRequest,
    RateLimits,
    ReportQuota,
    RevokeQuota,
    Settle,
)
from llm_api_server.ipc.trace_context import TracedRequest
from llm_api_server.ipc.usage_events import Batch, OpenRequest


class Hello(msgspec.Struct, tag="hello"):
    """First message of a worker.

    `in_flight` has its requests per instance id, so that a new manager counts them. `worker` is unique for the life of
    the worker; `admitted` are its requests that are admitted and not settled; `config` is the digest of its
    configuration (`config_handover.digest`).
    """

    pid: int
    in_flight: dict[str, int] = {}
    worker: str = ""
    admitted: list[AdmittedRequest] = []
    config: str = ""


class Refused(msgspec.Struct, tag="refused", rename={"rate_limits": "standing"}):
    """Refuse a request or a command. `code` is one of `errors.py`; `retry_after` is in seconds.

    `rate_limits` is set where the limits of the key are the reason, `position` where the queue is too long: the
    position the request would have had.
    """

    request: int
    code: str
    message: str
    retry_after: float | None = None
    should_retry: bool | None = None
    rate_limits: RateLimits | None = None
    position: int | None = None


# ── keys and usage ───────────────────────────────────────────────────────────────────────────────────────────────


class FindKey(msgspec.Struct, tag="find_key"):
    """Look up a key of the store, by the hex SHA-256 of its secret or by its id. The reply is `KeyFound`."""

    request: int
    digest: str | None = None
    key_id: str | None = None


class KeyFound(msgspec.Struct, tag="key_found"):
    """`key` is None when the store has no such key."""

    request: int
    key: Key | None = None


class KeysChanged(msgspec.Struct, tag="keys_changed"):
    """Keys to look up again before they are used; None: all of them, and all that were not found."""

    ids: list[str] | None = None


class ReportUsage(msgspec.Struct, tag="usage", omit_defaults=True):
    """Rows for the ledger, and traces. The reply is `UsageKept`.

    Until then the worker keeps the report, and sends it again after a loss of the connection.
    """

    number: int
    batch: Batch
    traced: list[TracedRequest] = []


class UsageKept(msgspec.Struct, tag="usage_kept"):
    """The batch is in the store, or in a queue of the manager that outlives the worker."""

    number: int


# ── configuration ────────────────────────────────────────────────────────────────────────────────────────────────


class Configure(msgspec.Struct, tag="configure"):
    """Follow this configuration, encoded by `config_handover.pack`, from now on. The reply is `Configured`."""

    config: str


class Configured(msgspec.Struct, tag="configured"):
    """The worker follows the configuration with this digest."""

    digest: str


class GetConfig(msgspec.Struct, tag="get_config"):
    """The reply is `CurrentConfig`."""

    request: int


class CurrentConfig(msgspec.Struct, tag="current_config"):
    """The configuration that the server follows, encoded by `config_handover.pack`."""

    request: int
    config: str


class ReloadConfig(msgspec.Struct, tag="reload"):
    """Read the configuration file again and follow it, unless `dry_run`. The reply is `Reloaded` or `Refused`."""

    request: int
    dry_run: bool = False


class Reloaded(msgspec.Struct, tag="reloaded"):
    """Changes of the configuration; not `applied` after a dry run. `late`: workers that did not follow in time."""

    request: int
    changes: list[Change]
    applied: bool
    late: int = 0


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────


class ListModels(msgspec.Struct, tag="list_models"):
    """The reply is `Models`, with memory and devices measured now."""

    request: int


class LoadModel(msgspec.Struct, tag="load_model"):
    """Load a model and clear the back-off of a failed load. The reply is `Models` or `Refused`.

    With `wait` the reply comes once the model is ready or has failed, otherwise at once.
    """

    request: int
    model: str
    wait: bool = True


class UnloadModel(msgspec.Struct, tag="unload_model"):
    """Drain and stop a model. The reply is `Models` or `Refused`; with `wait` it comes once the model is stopped.

    Requests that wait for the model are served after it is loaded again.
    """

    request: int
    model: str
    wait: bool = True


class PinModel(msgspec.Struct, tag="pin_model"):
    """Keep a loaded model, with its embedding instance, until it is unpinned or unloaded by command; or unpin it.

    The reply is `Models` or `Refused`.
    """

    request: int
    model: str
    is_pinned: bool = True


class Models(msgspec.Struct, tag="models"):
    """Status of all models: sent to workers (request 0) on `Hello` and on every change, and in reply to commands."""

    models: list[ModelStatus]
    request: int = 0


class ExplainModel(msgspec.Struct, tag="explain_model"):
    """The reply is `Explained` or `Refused`."""

    request: int
    model: str


class Explained(msgspec.Struct, tag="explained"):
    request: int
    explanation: Explanation


# ── the server ───────────────────────────────────────────────────────────────────────────────────────────────────


class GetStatus(msgspec.Struct, tag="get_status"):
    """The reply is `Status`."""

    request: int


class Status(msgspec.Struct, tag="status"):
    """The pids and the version of the server, and the devices as of the last `ListModels`."""

    request: int
    manager: int
    workers: list[int]
    version: str = ""
    devices: list[DeviceStatus] = []


class ListRequests(msgspec.Struct, tag="list_requests"):
    """List the running requests, at most `limit`, the oldest first. The reply is `Requests`."""

    request: int
    limit: int


class Requests(msgspec.Struct, tag="requests"):
    """`total` is the number of running requests, whatever the limit."""

    request: int
    requests: list[OpenRequest]
    total: int


class GetMetrics(msgspec.Struct, tag="get_metrics"):
    """The reply is `MetricsText`."""

    request: int


class MetricsText(msgspec.Struct, tag="metrics"):
    """Metrics in Prometheus' text format."""

    request: int
    text: str


class Shutdown(msgspec.Struct, tag="shutdown"):
    """Stop everything. The reply is `Models`, just before the manager exits, when no engine is left.

    With `keeps_engines` the engines go on serving, for the next manager to adopt.
    """

    request: int
    keeps_engines: bool = False


# ── unions ───────────────────────────────────────────────────────────────────────────────────────────────────────

Inquiry = ListModels | ListRequests | ExplainModel | GetStatus | GetConfig | GetMetrics
Command = LoadModel | UnloadModel | PinModel | ReloadConfig | Shutdown | Inquiry | DownloadCommand
SlotMessage = Acquire | Cancel | PrefillDone | ReturnSlots | ReportInFlight
QuotaMessage = FindKey | Admit | Settle | ReportQuota | ReportUsage
ToManager = Hello | SlotMessage | QuotaMessage | Configured | Command

CommandResponse = (
    Models | Requests | Explained | Status | CurrentConfig | MetricsText | DownloadStatuses | Removed | Reloaded
)
Response = Granted | Refused | KeyFound | Admitted | CommandResponse
ToClient = Response | Queued | RevokeSlots | KeysChanged | RevokeQuota | UsageKept | Configure


def to_manager_decoder() -> FrameDecoder[ToManager]:
    return FrameDecoder(ToManager)


def to_client_decoder() -> FrameDecoder[ToClient]:
    return FrameDecoder(ToClient)

"""The contract between API workers, the command line and the manager: their messages.

One unix stream socket in the run directory, framed by `framing.py`. Workers keep one connection open
(`gateway/link.py`); the command line opens one per command (`calls.py`). The manager's side is `manager/server.py`.

A lease, in these messages: an instance has places, one for each request that it works on at a time. `Granted` gives
one request a place, and the worker perhaps more of them: from those it may start requests without asking, until
`RevokeSlots` names the instance. Places are given back with `ReturnSlots`, which says how many, so that a grant that
is under
way at that moment is not lost: each with the end of its request, or, where nobody waits for them, all together when
there has been none for a while.

Limits: a request of a limited key is counted with `Admit` before it takes a lease, and `Settle` says what it used in
the end. While a limit is far, `Admitted` comes with a share of what is left, from which the worker admits by itself;
`ReportQuota` says what it used of it, and gives back what it does not need, or what `RevokeQuota` asks for. What all
requests used
comes in `ReportUsage`, in batches, each kept by the worker until `UsageKept`.

Configuration: all follow the manager's. `Hello` says which one a worker has; `Configure` gives it another.
"""

from __future__ import annotations

import msgspec

from llm_api_server.auth.access import Key, Limits
from llm_api_server.config.diff import Change
from llm_api_server.ipc.download_messages import Pull, Pulls, Removed
from llm_api_server.ipc.framing import FrameDecoder
from llm_api_server.ipc.model_status import DeviceStatus, Explanation, ModelStatus
from llm_api_server.ipc.trace_context import Traced
from llm_api_server.ipc.usage_events import Batch, OpenRequest
from llm_api_server.types import EngineName, Task


class InstanceInfo(msgspec.Struct, frozen=True):
    """What a worker must know to send requests to an instance.

    `address` is `unix:/path` or an `http(s)://host[:port][/prefix]` URL. `upstream_model` replaces `model` in the body
    when it is set. `headers` are sent with every request (a remote's own key). `model` is the configured name, also
    where the instance is that model's twin; `tasks` tells the two apart.
    """

    id: str
    model: str
    engine: EngineName
    address: str
    upstream_model: str | None = None
    headers: dict[str, str] = {}
    context_length: int | None = None
    tasks: tuple[Task, ...] | None = None

    def does(self, task: Task | None) -> bool:
        """Where nothing is known of it the engine itself must say no."""
        return task is None or self.tasks is None or task in self.tasks


class RateLimit(msgspec.Struct, frozen=True):
    """`remaining` of `limit` can be had now; all of it again in `reset` seconds."""

    limit: int
    remaining: int
    reset: float


class RateLimits(msgspec.Struct, frozen=True, omit_defaults=True):
    """How far a key is from its limits per minute; None where it has none. What `x-ratelimit-*` headers tell."""

    requests: RateLimit | None = None
    tokens: RateLimit | None = None


class QuotaGrant(msgspec.Struct, frozen=True, omit_defaults=True):
    """A part of what a key's limits leave. Of what is not limited it holds nothing, and nothing is needed."""

    requests: int = 0
    tokens: int = 0
    places: int = 0


NO_GRANT = QuotaGrant()


class AdmittedRequest(msgspec.Struct, frozen=True):
    """One admitted request of a worker, by its number there, and the tokens that are reserved for it."""

    request: int
    key_id: str
    reserved: int


# ── worker or command line → manager ─────────────────────────────────────────────────────────────────────────────


class Hello(msgspec.Struct, tag="hello"):
    """First message of a worker. `in_flight`: its requests per instance id, so that a new manager counts them.

    `worker` is unique for the worker's life; `admitted` are its requests that are admitted and not settled; `config`
    is the digest of its configuration (`applied_config.py`).
    """

    pid: int
    in_flight: dict[str, int] = {}
    worker: str = ""
    admitted: list[AdmittedRequest] = []
    config: str = ""


class Claim(msgspec.Struct, frozen=True, omit_defaults=True):
    """Whose request it is that wants a place, about how much work it makes (`usage.work`), and tokens it has to `read`.

    Keys share by `weight`. One `is_batch` comes after all others, one `is_light` makes no work and needs no place.
    """

    key_id: str = ""
    weight: float = 1.0
    work: int = 1
    reads: int = 0
    is_batch: bool = False
    is_light: bool = False


NO_CLAIM = Claim()


class Acquire(msgspec.Struct, tag="acquire"):
    """Ask for an instance of `model` (a configured name, aliases resolved) that does `task`; None: any will do.

    Answered by `Granted` or `Refused`; until then `Queued` may tell how many are to be served first.
    """

    request: int
    model: str
    task: Task | None = None
    claim: Claim = NO_CLAIM


class Cancel(msgspec.Struct, tag="cancel"):
    """The request no longer waits. A `Granted` already under way is given back by the worker as usual."""

    request: int


class PrefillDone(msgspec.Struct, tag="read"):
    """The request of that number, which was asked for, has its first token: another's prompt can be read."""

    number: int


class EndedRequest(msgspec.Struct, frozen=True, array_like=True):
    """A request is over. It made so much more work than its claim said, or less."""

    key_id: str
    more_work: int = 0


class ReturnSlots(msgspec.Struct, tag="release", omit_defaults=True):
    """`ended` names the requests where each was asked for."""

    instance: str
    places: int
    ended: list[EndedRequest] = []


class ReportInFlight(msgspec.Struct, tag="report"):
    """Requests in flight per instance id, and those of them whose clients do not read what has come.

    Sent at most a few times a second, only when changed.
    """

    in_flight: dict[str, int]
    blocked: dict[str, int] = {}


class FindKey(msgspec.Struct, tag="find_key"):
    """Ask for a key of the store, by the hex SHA-256 of its secret or by its id. Answered by `KeyFound`."""

    request: int
    digest: str | None = None
    key_id: str | None = None


class Admit(msgspec.Struct, tag="admit"):
    """Count a request of a limited key. Answered by `Admitted` or `Refused`.

    At least `tokens` are reserved, and up to `spare` more where the limits leave them. `counts=False` only asks how the
    key stands.
    """

    request: int
    key_id: str
    name: str
    limits: Limits
    tokens: int = 0
    spare: int = 0
    counts: bool = True


class Settle(msgspec.Struct, tag="settle"):
    """An admitted request is over, or is not wanted any more; it used `tokens` of those that were reserved."""

    request: int
    tokens: int


class ReportQuota(msgspec.Struct, tag="spend", omit_defaults=True):
    """Since the last one `requests` were admitted from a share, and `tokens` used by those that ended; `back` is given
    back. `is_answer`: to a `RevokeQuota`.
    """

    key_id: str
    requests: int = 0
    tokens: int = 0
    back: QuotaGrant = NO_GRANT
    is_answer: bool = False


class ReportUsage(msgspec.Struct, tag="usage", omit_defaults=True):
    """Rows for the ledger, and traces. Answered by `UsageKept`; after a loss of the connection it is said again."""

    number: int
    batch: Batch
    traced: list[Traced] = []


class ListModels(msgspec.Struct, tag="list_models"):
    request: int


class LoadModel(msgspec.Struct, tag="load_model"):
    """Load and, when `wait`, answer once it is ready or failed; clears a `failed` state's back-off."""

    request: int
    model: str
    wait: bool = True


class UnloadModel(msgspec.Struct, tag="unload_model"):
    """Drain, stop and, when `wait`, answer once it is stopped. Requests that wait for it are served after a reload."""

    request: int
    model: str
    wait: bool = True


class PinModel(msgspec.Struct, tag="pin_model"):
    """Keep a loaded model, with its twin, until it is unpinned or unloaded by order; or, not `is_pinned`, unpin it.

    Answered by `Models` or `Refused`.
    """

    request: int
    model: str
    is_pinned: bool = True


class ExplainModel(msgspec.Struct, tag="explain_model"):
    """Answered by `Explained`."""

    request: int
    model: str


class GetStatus(msgspec.Struct, tag="get_status"):
    """Answered by `Status`."""

    request: int


class ListRequests(msgspec.Struct, tag="list_requests"):
    """Those that run, at most so many, the oldest first. Answered by `Requests`."""

    request: int
    limit: int


class GetConfig(msgspec.Struct, tag="get_config"):
    """Answered by `CurrentConfig`."""

    request: int


class GetMetrics(msgspec.Struct, tag="get_metrics"):
    """Answered by `MetricsText`."""

    request: int


class ReloadConfig(msgspec.Struct, tag="reload"):
    """Read the configuration file again and follow it, unless `dry_run`. Answered by `Reloaded` or `Refused`."""

    request: int
    dry_run: bool = False


class Configured(msgspec.Struct, tag="configured"):
    """The worker follows the configuration with this digest."""

    digest: str


class Shutdown(msgspec.Struct, tag="shutdown"):
    """Stop everything; answered just before the manager exits, when no engine is left.

    `keeps_engines`: they serve on, for the next manager to adopt.
    """

    request: int
    keeps_engines: bool = False


Inquiry = ListModels | ListRequests | ExplainModel | GetStatus | GetConfig | GetMetrics
Command = LoadModel | UnloadModel | PinModel | ReloadConfig | Shutdown | Inquiry | Pull
SlotMessage = Acquire | Cancel | PrefillDone | ReturnSlots | ReportInFlight
QuotaMessage = FindKey | Admit | Settle | ReportQuota | ReportUsage
ToManager = Hello | SlotMessage | QuotaMessage | Configured | Command

# ── manager → worker or command line ─────────────────────────────────────────────────────────────────────────────


class Granted(msgspec.Struct, tag="granted", omit_defaults=True):
    """`places`, that of the request among them. `keeps`: they are the worker's until they are reclaimed.

    `key_id` is that of the claim, for a worker that has forgotten it: its client has left.
    """

    request: int
    instance: InstanceInfo
    places: int = 1
    keeps: bool = False
    key_id: str = ""


class Queued(msgspec.Struct, tag="queued"):
    """The request of that number waits; it is the `position`-th to be served, from 1."""

    number: int
    position: int


class Refused(msgspec.Struct, tag="refused"):
    """Answer to a question or a command. `code` is one of `errors.py`; `retry_after` in seconds.

    `standing` is that of the key, where its limits are the reason, `position` where it would have been in the queue.
    """

    request: int
    code: str
    message: str
    retry_after: float | None = None
    should_retry: bool | None = None
    standing: RateLimits | None = None
    position: int | None = None


class KeyFound(msgspec.Struct, tag="key_found"):
    """`key` is None when the store has no such key."""

    request: int
    key: Key | None = None


class KeysChanged(msgspec.Struct, tag="keys_changed"):
    """Keys to be asked for again before they are used; None: all of them, and those that were not found."""

    ids: list[str] | None = None


class Admitted(msgspec.Struct, tag="admitted"):
    """`standing` is that after this request, `share` what the worker may admit by itself from now on."""

    request: int
    standing: RateLimits
    reserved: int = 0
    share: QuotaGrant = NO_GRANT


class RevokeQuota(msgspec.Struct, tag="recall"):
    """Another worker needs it: give back what is left of a key's share, and the rest as it gets free."""

    key_id: str


class UsageKept(msgspec.Struct, tag="usage_kept"):
    """The batch is in the store, or waits there where it outlives the worker."""

    number: int


class RevokeSlots(msgspec.Struct, tag="reclaim"):
    """Start nothing more on this instance without asking: give back the places that are free, and each that gets free.

    Others wait for them, or it is to be unloaded. What is in flight may finish.
    """

    instance: str


class Models(msgspec.Struct, tag="models"):
    """All models. Pushed (request 0) to workers on `Hello` and on every change; the answer to commands."""

    models: list[ModelStatus]
    request: int = 0


class Explained(msgspec.Struct, tag="explained"):
    request: int
    explanation: Explanation


class Status(msgspec.Struct, tag="status"):
    """The processes of the server, by their pids, its version, and the devices as `ListModels` last saw them."""

    request: int
    manager: int
    workers: list[int]
    version: str = ""
    devices: list[DeviceStatus] = []


class Requests(msgspec.Struct, tag="requests"):
    """`total` is how many run."""

    request: int
    requests: list[OpenRequest]
    total: int


class CurrentConfig(msgspec.Struct, tag="current_config"):
    """As `applied_config.py` packs it."""

    request: int
    config: str


class MetricsText(msgspec.Struct, tag="metrics"):
    """In Prometheus' text format."""

    request: int
    text: str


class Reloaded(msgspec.Struct, tag="reloaded"):
    """What changes, or, without `applied`, would change. `late`: workers that had not followed in time."""

    request: int
    changes: list[Change]
    applied: bool
    late: int = 0


class Configure(msgspec.Struct, tag="configure"):
    """Follow this configuration, as `applied_config.py` packs it, from now on. Answered by `Configured`."""

    config: str


CommandResponse = Models | Requests | Explained | Status | CurrentConfig | MetricsText | Pulls | Removed | Reloaded
Response = Granted | Refused | KeyFound | Admitted | CommandResponse
ToClient = Response | Queued | RevokeSlots | KeysChanged | RevokeQuota | UsageKept | Configure


def to_manager_decoder() -> FrameDecoder[ToManager]:
    return FrameDecoder(ToManager)


def to_client_decoder() -> FrameDecoder[ToClient]:
    return FrameDecoder(ToClient)

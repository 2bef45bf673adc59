"""Declarations of the server's own metrics; `docs/metrics.md` is made from them.

Names follow Prometheus ("Metric and label naming"): base units, `_total` on counters. Values of labels are bounded:
models are those that exist, keys at most `MAX_KEYS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PREFIX = "llm_api_server_"
#: Keys with a label of their own; all further ones count as `OTHER_KEYS`.
MAX_KEYS = 1000
OTHER_KEYS = "(other keys)"

_WAITS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_STEPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_LOADS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200)

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, eq=False)
class Metric:
    """Declaration of a metric; `buckets` are the upper bounds of a histogram, in its unit.

    Not prometheus_client's own type: see `Counters` for the cost of those.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


METRICS: list[Metric] = []


def _metric(kind: Kind, name: str, text: str, *labels: str, buckets: tuple[float, ...] = ()) -> Metric:
    metric = Metric(PREFIX + name, kind, text, labels, buckets)
    METRICS.append(metric)
    return metric


REQUESTS = _metric(
    "counter", "requests_total",
    "Finished requests. `status` is the HTTP status; 499: the client disconnected first, 0: its worker was lost. "
    "`endpoint` is `other` for requests without an engine.",
    "endpoint", "model", "key", "status",
)  # fmt: skip
ERRORS = _metric(
    "counter", "errors_total",
    "Finished requests with an error, by its code, including errors after a status of 200.",
    "endpoint", "model", "code",
)  # fmt: skip
LIMIT_HITS = _metric("counter", "limit_hits_total", "Requests refused by a limit of their key.", "key", "limit")
TOKENS = _metric(
    "counter", "tokens_total",
    "Tokens. `kind`: `prompt`, of which `cached` were not computed, `completion`, of which `reasoning`.",
    "model", "key", "kind",
)  # fmt: skip
ABORTED_TOKENS = _metric(
    "counter", "aborted_tokens_total", "Tokens generated for clients that disconnected before the end.", "model"
)
REQUEST_SECONDS = _metric(
    "histogram", "request_seconds", "From the head of a request to the end of its response.", "endpoint", "model",
    buckets=_WAITS,
)  # fmt: skip
QUEUE_SECONDS = _metric(
    "histogram", "queue_seconds", "Until a request had an instance: its queue, and the load if there was one.",
    "model", buckets=_WAITS,
)  # fmt: skip
FIRST_TOKEN_SECONDS = _metric(
    "histogram", "time_to_first_token_seconds", "Until the engine's first token of a stream, the queue included.",
    "model", buckets=_WAITS,
)  # fmt: skip
INTER_TOKEN_SECONDS = _metric(
    "histogram", "inter_token_seconds", "Mean time between two tokens of a stream, one value per stream.",
    "model", buckets=_STEPS,
)  # fmt: skip

RUNNING = _metric("gauge", "requests_running", "Requests inside the engine now.", "model")
WAITING = _metric("gauge", "requests_waiting", "Requests in the queue now.", "model")

MODEL_STATE = _metric("gauge", "model_state", "1 for the current state of the model.", "model", "state")
MODEL_MEMORY = _metric(
    "gauge", "model_memory_bytes", "RAM of the engine's processes; shared memory is divided.", "model"
)
LOADS = _metric(
    "counter", "model_loads_total",
    "Finished loads. `result`: `ok`, `failed`, `cancelled` (no longer needed), `woken` (from sleep).",
    "model", "result",
)  # fmt: skip
UNLOADS = _metric(
    "counter", "model_unloads_total",
    "Ends of loaded models. `reason`: `evicted` (to free memory), `idle`, `ordered`, `asleep`, `failed`.",
    "model", "reason",
)  # fmt: skip
LOAD_SECONDS = _metric("histogram", "model_load_seconds", "Duration of loads.", "model", buckets=_LOADS)
PHASE_SECONDS = _metric(
    "histogram", "model_load_phase_seconds", "Duration of the phases of loads.", "model", "phase", buckets=_LOADS
)

DEVICE_MEMORY = _metric(
    "gauge", "device_memory_bytes",
    "Memory as the scheduler counts it. `kind`: `total`, `limit` (for models), `taken` by models, `foreign` (by other "
    "programs), `free`.",
    "device", "kind",
)  # fmt: skip
WORKERS = _metric("gauge", "workers", "API workers that are connected to the manager.")
PROCESS_MEMORY = _metric(
    "gauge", "process_memory_bytes", "RAM; shared memory is divided. `process`: `manager` or all `workers`.", "process"
)
PROCESS_CPU = _metric("counter", "process_cpu_seconds_total", "CPU time of the running processes.", "process")
PROCESS_FDS = _metric("gauge", "process_open_fds", "Open descriptors.", "process")
STORE_UP = _metric("gauge", "store_up", "1 while the database can be used.")
STORE_WAITING = _metric("gauge", "store_waiting_reports", "Usage reports that are not in the database yet.")
BUILD = _metric("gauge", "build_info", "Always 1.", "version")

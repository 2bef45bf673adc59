"""Requests that run on the workers: shown as live requests, and settled when their worker is lost. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from llm_api_server.ipc.usage_events import (
    NO_USAGE,
    WORKER_LOST,
    Batch,
    FinishedRequest,
    OpenRequest,
    RequestEnded,
    RequestStart,
    RequestStarted,
    RunningState,
    Usage,
    finish,
)


@dataclass
class _Row:
    """State of one request; `started` is None if an earlier manager received its beginning."""

    started: RequestStarted | None = None
    usage: Usage = NO_USAGE
    state: RunningState | None = None


_NO_ROW = _Row()


class OpenRequests:
    """Rows that are not settled, by worker."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, _Row]] = {}

    def workers(self) -> set[str]:
        return set(self._rows)

    def update(self, worker: str, batch: Batch) -> list[FinishedRequest]:
        """Apply a worker's batch; return the requests that it `ended`, joined with their beginnings."""
        rows = self._rows.setdefault(worker, {})
        for started in batch.started:
            rows[started.row] = _Row(started)
        for progress in batch.progress:
            rows.setdefault(progress.row, _Row()).usage = progress.usage
        for state in batch.live:
            rows.setdefault(state.row, _Row()).state = state
        return [finish(rows.pop(ended.row, _NO_ROW).started, ended) for ended in batch.ended]

    def open(self) -> list[OpenRequest]:
        """Return all running requests, the oldest first."""
        rows = [row for of_worker in self._rows.values() for row in of_worker.values()]
        found = [_as_open(row.started, row) for row in rows if row.started is not None]
        return sorted(found, key=lambda one: one.at)

    def lose(self, worker: str, now: float) -> tuple[list[RequestEnded], list[FinishedRequest]]:
        """Remove the rows of a lost worker; return their ends at `now` (Unix seconds), alone and joined."""
        ended: list[RequestEnded] = []
        finished: list[FinishedRequest] = []
        for name, row in self._rows.pop(worker, {}).items():
            duration = now - row.started.at if row.started is not None else 0.0
            ended.append(RequestEnded(name, 0, WORKER_LOST, None, row.usage, None, None, duration))
            finished.append(finish(row.started, ended[-1]))
        return ended, finished


def _as_open(started: RequestStarted, row: _Row) -> OpenRequest:
    state = row.state or RunningState(started.row)
    return OpenRequest(
        **{name: getattr(started, name) for name in RequestStart.__struct_fields__},
        usage=row.usage,
        queued=state.queued,
        first_token=state.first_token,
        position=state.position,
    )

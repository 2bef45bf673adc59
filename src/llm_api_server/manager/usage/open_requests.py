"""Requests that run on the workers: shown as live requests, and settled when their worker is lost. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from llm_api_server.ipc.usage_events import (
    NO_USAGE,
    WORKER_LOST,
    Batch,
    Live,
    OpenRequest,
    RequestEnded,
    RequestStarted,
    Usage,
)


@dataclass
class _Row:
    """State of one request; `started` is None if an earlier manager received its beginning."""

    started: RequestStarted | None = None
    usage: Usage = NO_USAGE
    live: Live | None = None


_NO_ROW = _Row()


class OpenRequests:
    """Rows that are not settled, by worker."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, _Row]] = {}

    def workers(self) -> set[str]:
        return set(self._rows)

    def update(self, worker: str, batch: Batch) -> list[tuple[RequestStarted | None, RequestEnded]]:
        """Apply a worker's report; return the requests that ended with their beginnings."""
        rows = self._rows.setdefault(worker, {})
        for started in batch.started:
            rows[started.row] = _Row(started)
        for progress in batch.progress:
            rows.setdefault(progress.row, _Row()).usage = progress.usage
        for live in batch.live:
            rows.setdefault(live.row, _Row()).live = live
        return [(rows.pop(ended.row, _NO_ROW).started, ended) for ended in batch.ended]

    def open(self) -> list[OpenRequest]:
        """Return all running requests, the oldest first."""
        rows = [row for of_worker in self._rows.values() for row in of_worker.values()]
        found = [_as_open(row.started, row) for row in rows if row.started is not None]
        return sorted(found, key=lambda one: one.at)

    def lose(self, worker: str, now: float) -> tuple[list[tuple[RequestStarted | None, RequestEnded]], Counter[str]]:
        """Remove a lost worker's rows; return their ends at `now` (Unix seconds) with their beginnings, and tokens by
        key.
        """
        ended: list[tuple[RequestStarted | None, RequestEnded]] = []
        tokens: Counter[str] = Counter()
        for name, row in self._rows.pop(worker, {}).items():
            started = row.started
            duration = now - started.at if started is not None else 0.0
            ended.append((started, RequestEnded(name, 0, WORKER_LOST, None, row.usage, None, None, duration)))
            if started is not None:
                tokens[started.key_id] += row.usage.prompt_tokens + row.usage.completion_tokens
        return ended, tokens


def _as_open(started: RequestStarted, row: _Row) -> OpenRequest:
    live = row.live or Live(started.row)
    return OpenRequest(
        request_id=started.request_id,
        key_id=started.key_id,
        key_name=started.key_name,
        model=started.model,
        endpoint=started.endpoint,
        stream=started.stream,
        at=started.at,
        usage=row.usage,
        queued=live.queued,
        first_token=live.first_token,
        position=live.position,
    )

"""Requests and commands that wait for the scheduler, and their positions in the queue. On the manager's one loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count

from llm_api_server.ipc.lease_messages import Queued
from llm_api_server.manager.worker_session import WorkerSession

#: Seconds between two reports of the positions in the queue.
POSITION_INTERVAL = 1.0


@dataclass(frozen=True)
class PendingRequest:
    """`model` is the name that the scheduler uses: a configured model or its embedding instance."""

    client: WorkerSession
    request: int
    model: str


class PendingRequests:
    """Pending requests by the scheduler's number. `positions` returns the position of each that is in a queue."""

    def __init__(
        self, positions: Callable[[], Mapping[int, int]], position_interval: float = POSITION_INTERVAL
    ) -> None:
        self._pending: dict[int, PendingRequest] = {}
        self._ids = count(1)
        self._positions = positions
        self._position_interval = position_interval
        self._reported: dict[int, int] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __contains__(self, waiter: int) -> bool:
        return waiter in self._pending

    def __getitem__(self, waiter: int) -> PendingRequest:
        return self._pending[waiter]

    def new_id(self) -> int:
        return next(self._ids)

    def put(self, waiter: int, pending: PendingRequest) -> None:
        self._pending[waiter] = pending
        if self._timer is None:
            self._plan_report()

    def pop(self, waiter: int) -> PendingRequest | None:
        self._reported.pop(waiter, None)
        return self._pending.pop(waiter, None)

    def pop_all_of(self, client: WorkerSession, request: int | None = None) -> Iterator[tuple[int, PendingRequest]]:
        """Remove and yield the client's pending requests, or the one with that number."""
        for waiter, pending in list(self._pending.items()):
            if pending.client is client and request in {None, pending.request}:
                self.pop(waiter)
                yield waiter, pending

    def has(self, client: WorkerSession, request: int) -> bool:
        return any(pending.client is client and pending.request == request for pending in self._pending.values())

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _plan_report(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._position_interval, self._report_positions)

    def _report_positions(self) -> None:
        """Send `Queued` to each request whose position has changed."""
        self._timer = None
        if not self._pending:
            return
        self._plan_report()
        for waiter, position in self._positions().items():
            pending = self._pending.get(waiter)
            if pending is not None and self._reported.get(waiter) != position:
                self._reported[waiter] = position
                pending.client.send(Queued(pending.request, position))

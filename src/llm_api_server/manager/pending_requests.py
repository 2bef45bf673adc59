"""Whom to answer when the scheduler grants, refuses or is done, and who is told how long its queue is. On one loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from llm_api_server.ipc.lease_messages import Queued

if TYPE_CHECKING:
    from llm_api_server.manager.worker_session import WorkerSession

#: Seconds between two words to a request on its place in the queue.
_POSITION_INTERVAL = 1.0


@dataclass(frozen=True)
class PendingRequest:
    """A request of a client. `model` is what the scheduler was asked for: a configured name or a twin's."""

    client: WorkerSession
    request: int
    model: str


class PendingRequests:
    """By the scheduler's number of the waiter. `positions` tells where each one stands that is in a queue."""

    def __init__(self, positions: Callable[[], Mapping[int, int]]) -> None:
        self._asked: dict[int, PendingRequest] = {}
        self._ids = count(1)
        self._positions = positions
        self._told: dict[int, int] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __contains__(self, waiter: int) -> bool:
        return waiter in self._asked

    def __getitem__(self, waiter: int) -> PendingRequest:
        return self._asked[waiter]

    def new_id(self) -> int:
        return next(self._ids)

    def put(self, waiter: int, asked: PendingRequest) -> None:
        self._asked[waiter] = asked
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_POSITION_INTERVAL, self._tell)

    def pop(self, waiter: int) -> PendingRequest | None:
        self._told.pop(waiter, None)
        return self._asked.pop(waiter, None)

    def pop_all_of(self, client: WorkerSession, request: int | None = None) -> Iterator[tuple[int, PendingRequest]]:
        """What the client asked and nobody has answered; with `request`, that alone."""
        for waiter, asked in list(self._asked.items()):
            if asked.client is client and request in {None, asked.request}:
                self.pop(waiter)
                yield waiter, asked

    def has(self, client: WorkerSession, request: int) -> bool:
        return any(asked.client is client and asked.request == request for asked in self._asked.values())

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tell(self) -> None:
        self._timer = None
        if not self._asked:
            return
        self._timer = asyncio.get_running_loop().call_later(_POSITION_INTERVAL, self._tell)
        for waiter, position in self._positions().items():
            asked = self._asked.get(waiter)
            if asked is not None and self._told.get(waiter) != position:
                self._told[waiter] = position
                asked.client.send(Queued(asked.request, position))

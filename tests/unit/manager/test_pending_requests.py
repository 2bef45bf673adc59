"""Requests that wait for the scheduler, and the reports of their positions."""

from __future__ import annotations

import pytest

from llm_api_server.ipc.lease_messages import Queued
from llm_api_server.manager.pending_requests import PendingRequest, PendingRequests
from tests.manager_doubles import FakeWorkerSession
from tests.waiting import until

pytestmark = pytest.mark.anyio


async def test_positions_are_sent_when_they_change() -> None:
    positions: dict[int, int] = {}
    calls = 0

    def current() -> dict[int, int]:
        nonlocal calls
        calls += 1
        return dict(positions)

    pending, worker = PendingRequests(current, position_interval=0.01), FakeWorkerSession()
    first, second = pending.new_id(), pending.new_id()
    pending.put(first, PendingRequest(worker, 11, "m"))
    pending.put(second, PendingRequest(worker, 12, "m"))
    positions |= {first: 1, second: 2, 99: 3}
    await until(lambda: len(worker.sent) == 2)
    before = calls
    await until(lambda: calls > before + 1)
    assert worker.sent == [Queued(11, 1), Queued(12, 2)]
    pending.pop(first)
    positions.clear()
    positions[second] = 1
    await until(lambda: len(worker.sent) > 2)
    assert worker.sent[2:] == [Queued(12, 1)]
    pending.close()


async def test_a_client_cancels_its_own_requests_only() -> None:
    pending, mine, other = PendingRequests(dict), FakeWorkerSession(), FakeWorkerSession()
    ids = [pending.new_id() for _ in range(4)]
    for waiter, client, request in zip(ids, (mine, other, mine, mine), (1, 1, 2, 3), strict=True):
        pending.put(waiter, PendingRequest(client, request, "m"))
    assert [waiter for waiter, _ in pending.pop_all_of(mine, 2)] == [ids[2]]
    assert not pending.has(mine, 2)
    assert [one.request for _, one in pending.pop_all_of(mine)] == [1, 3]
    assert ids[1] in pending
    assert pending[ids[1]].client is other
    assert pending.pop(ids[0]) is None
    pending.close()

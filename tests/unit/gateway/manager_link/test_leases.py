"""Leases in every order of messages, against the fake manager on a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from llm_api_server.errors import ModelLoadFailed
from llm_api_server.gateway.manager_link.leases import Leases
from llm_api_server.gateway.manager_link.link import ManagerLink
from llm_api_server.gateway.manager_link.model_commands import ModelCommands
from llm_api_server.ipc.lease_messages import (
    Acquire,
    Claim,
    EndedRequest,
    Granted,
    InstanceInfo,
    PrefillDone,
    Queued,
    ReportInFlight,
    ReturnSlots,
    RevokeSlots,
)
from llm_api_server.ipc.messages import Refused
from tests.fake_manager import FakeManager
from tests.waiting import until

pytestmark = pytest.mark.anyio


@pytest.fixture
async def leases(link: ManagerLink) -> AsyncIterator[Leases]:
    one = Leases(link, report_interval=0.02, linger=0.05)
    await link.start()
    await until(lambda: one.models)
    yield one
    one.close()


async def test_a_batch_of_slots_serves_several_requests_and_goes_back_whole(
    leases: Leases, manager: FakeManager
) -> None:
    first = await leases.acquire("m")
    second = await leases.acquire("m")
    first.release()
    first.release()
    assert manager.received_of(ReturnSlots) == []
    second.release()
    await until(lambda: manager.received_of(ReturnSlots))
    assert len(manager.received_of(Acquire)) == 1
    assert manager.received_of(ReturnSlots) == [ReturnSlots("m-1", 1000)]


async def test_slots_serve_only_the_tasks_of_their_instance(leases: Leases, manager: FakeManager) -> None:
    manager.instances["m"] = InstanceInfo("m-1", "m", "vllm", "unix:/x", tasks=("generate",))
    first = await leases.acquire("m", "generate")
    manager.instances["m"] = InstanceInfo("m-2", "m", "vllm", "unix:/y", tasks=("embed",))
    second = await leases.acquire("m", "embed")
    assert (first.instance.id, second.instance.id) == ("m-1", "m-2")
    assert [one.task for one in manager.received_of(Acquire)] == ["generate", "embed"]
    again = [await leases.acquire("m", "embed"), await leases.acquire("m", "generate"), await leases.acquire("m")]
    assert [lease.instance.id for lease in again[:2]] == ["m-2", "m-1"]
    assert len(manager.received_of(Acquire)) == 2
    for lease in (first, second, *again):
        lease.release()


async def test_every_waiter_gets_its_own_grant_and_all_slots_go_back_together(
    leases: Leases, manager: FakeManager
) -> None:
    manager.hold = True
    waiting = [asyncio.create_task(leases.acquire("m")) for _ in range(3)]
    await until(lambda: len(manager.received_of(Acquire)) == 3)
    manager.grant_all()
    for lease in await asyncio.gather(*waiting):
        lease.release()
    await until(lambda: manager.received_of(ReturnSlots))
    assert manager.received_of(ReturnSlots) == [ReturnSlots("m-1", 3000)]


async def test_a_grant_that_crosses_a_cancel_goes_back(leases: Leases, manager: FakeManager) -> None:
    manager.hold = True
    waiting = asyncio.create_task(leases.acquire("m"))
    await until(lambda: manager.received_of(Acquire))
    manager.grant_all()
    waiting.cancel()
    await until(lambda: manager.received_of(ReturnSlots))
    assert manager.received_of(ReturnSlots) == [ReturnSlots("m-1", 1000)]


async def test_a_lease_granted_to_a_task_that_is_cancelled_at_once_goes_back(
    leases: Leases, link: ManagerLink, manager: FakeManager
) -> None:
    waiting = asyncio.create_task(leases.acquire("m"))
    await asyncio.sleep(0)
    link.on_message(Granted(1, manager.instances["m"]))
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await until(lambda: manager.received_of(ReturnSlots))


async def test_a_slot_granted_after_the_cancel_goes_back_with_its_key_and_prefill(
    leases: Leases, link: ManagerLink, manager: FakeManager
) -> None:
    manager.hold = True
    waiting = asyncio.create_task(leases.acquire("m", claim=Claim("key", prefill_tokens=100)))
    await until(lambda: manager.received_of(Acquire))
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    link.on_message(Granted(1, manager.instances["m"], 1, until_revoked=False, key_id="key"))
    await until(lambda: manager.received_of(ReturnSlots))
    assert manager.received_of(PrefillDone) == [PrefillDone(1)]
    assert manager.received_of(ReturnSlots) == [ReturnSlots("m-1", 1, [EndedRequest("key")])]


async def test_revoked_slots_serve_no_further_request_until_a_new_grant(
    leases: Leases, link: ManagerLink, manager: FakeManager
) -> None:
    first = await leases.acquire("m")
    link.on_message(RevokeSlots("m-1"))
    await until(lambda: manager.received_of(ReturnSlots) == [ReturnSlots("m-1", 999)])
    second = await leases.acquire("m")
    third = await leases.acquire("m")
    assert len(manager.received_of(Acquire)) == 2
    for lease in (first, second, third):
        lease.release()
    await until(lambda: len(manager.received_of(ReturnSlots)) == 2)
    assert manager.received_of(ReturnSlots)[1:] == [ReturnSlots("m-1", 1001)]


async def test_slots_granted_for_one_request_go_back_one_by_one_with_their_cost(
    leases: Leases, manager: FakeManager
) -> None:
    manager.slots, manager.until_revoked = 1, False
    claim = Claim("key", cost=100)
    first, second = await leases.acquire("m", claim=claim), await leases.acquire("m", claim=claim)
    assert len(manager.received_of(Acquire)) == 2
    first.release(130)
    await until(lambda: len(manager.received_of(ReturnSlots)) == 1)
    second.release()
    await until(lambda: len(manager.received_of(ReturnSlots)) == 2)
    assert manager.received_of(ReturnSlots) == [
        ReturnSlots("m-1", 1, [EndedRequest("key", 30)]),
        ReturnSlots("m-1", 1, [EndedRequest("key")]),
    ]


async def test_requests_on_slots_that_are_revoked_meanwhile_report_their_cost(
    leases: Leases, link: ManagerLink, manager: FakeManager
) -> None:
    first = await leases.acquire("m", claim=Claim("waited", cost=5))
    second = leases.take("m", None, "took")
    assert second is not None
    link.on_message(RevokeSlots("m-1"))
    assert leases.take("m", None, "took") is None
    second.release(40)
    first.release(5)
    await until(lambda: len(manager.received_of(ReturnSlots)) == 3)
    assert [one.ended for one in manager.received_of(ReturnSlots)] == [
        [],
        [EndedRequest("took", 40)],
        [EndedRequest("waited", 0)],
    ]


async def test_a_waiter_gets_its_position_in_the_queue(leases: Leases, link: ManagerLink, manager: FakeManager) -> None:
    manager.hold = True
    positions: list[int] = []
    waiting = asyncio.create_task(leases.acquire("m", on_position=positions.append))
    await until(lambda: manager.received_of(Acquire))
    link.on_message(Queued(1, 3))
    link.on_message(Queued(99, 1))
    manager.grant_all()
    (await waiting).release()
    assert positions == [3]


async def test_no_request_starts_on_a_broken_instance_before_a_new_grant(leases: Leases, manager: FakeManager) -> None:
    first, second = await leases.acquire("m"), await leases.acquire("m")
    first.release(is_broken=True)
    third = await leases.acquire("m")
    assert len(manager.received_of(Acquire)) == 2
    second.release()
    third.release()


async def test_a_refusal_is_raised_with_its_code(leases: Leases, link: ManagerLink, manager: FakeManager) -> None:
    manager.refusal = lambda request: Refused(request, "model_load_failed", "no memory", 3, should_retry=False)
    with pytest.raises(ModelLoadFailed) as caught:
        await leases.acquire("m")
    assert (caught.value.message, caught.value.retry_after, caught.value.should_retry) == ("no memory", 3, False)
    with pytest.raises(ModelLoadFailed):
        await ModelCommands(link).load("m", wait=True)


async def test_reports_have_the_requests_in_flight_and_the_blocked_ones(leases: Leases, manager: FakeManager) -> None:
    first, second = await leases.acquire("m"), await leases.acquire("m")
    await until(lambda: ReportInFlight({"m-1": 2}) in manager.received)
    first.on_blocked(is_blocked=True)
    await until(lambda: ReportInFlight({"m-1": 2}, {"m-1": 1}) in manager.received)
    first.release()
    second.release()
    await until(lambda: ReportInFlight({"m-1": 0}) in manager.received)


async def test_slots_stay_over_short_gaps_and_go_back_when_they_are_revoked(
    link: ManagerLink, manager: FakeManager
) -> None:
    leases = Leases(link, report_interval=0.01, linger=1000)
    await link.start()
    for _ in range(5):
        (await leases.acquire("m")).release()
        idle = len(manager.received_of(ReportInFlight))
        await until(lambda: len(manager.received_of(ReportInFlight)) > idle)  # noqa: B023 - awaited in the loop
    assert len(manager.received_of(Acquire)) == 1
    assert not manager.received_of(ReturnSlots)
    link.on_message(RevokeSlots("m-1"))
    await until(lambda: manager.received_of(ReturnSlots))
    leases.close()

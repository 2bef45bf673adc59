"""Leases in the order that messages can come in, against the fake manager on a real socket."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llm_api_server.config.models import Config, ServerConfig
from llm_api_server.errors import EngineUnavailable, ModelLoadFailed, ShuttingDown
from llm_api_server.gateway.manager_link import link as module
from llm_api_server.gateway.manager_link.leases import Leases
from llm_api_server.gateway.manager_link.link import ManagerLink, ManagerProcess
from llm_api_server.ipc import lease_messages, messages
from llm_api_server.ipc.lease_messages import InstanceInfo
from llm_api_server.ipc.model_status import ModelStatus
from llm_api_server.ipc.run_dir import RunDir
from llm_api_server.types import ModelState
from tests.fake_manager import FakeManager
from tests.waiting import until

pytestmark = pytest.mark.anyio


@pytest.fixture
async def manager() -> AsyncIterator[FakeManager]:
    with tempfile.TemporaryDirectory(prefix="gw-") as path:
        info = InstanceInfo("m-1", "m", "llama_cpp", "unix:/x")
        one = FakeManager(RunDir(Path(path)), [ModelStatus("m", ModelState.STOPPED, "llama_cpp", "m")], {"m": info})
        await one.start()
        yield one
        await one.stop()


@pytest.fixture
async def link(manager: FakeManager) -> AsyncIterator[ManagerLink]:
    one = ManagerLink(manager.run_dir, lambda _: None)
    yield one
    await one.close()


@pytest.fixture
async def leases(link: ManagerLink) -> AsyncIterator[Leases]:
    one = Leases(link)
    await link.start()
    await until(lambda: bool(one.models))
    yield one
    one.close()


async def test_second_lease_is_free_while_the_first_is_held(leases: Leases, manager: FakeManager) -> None:
    first = await leases.acquire("m")
    second = await leases.acquire("m")
    first.release()
    first.release()
    assert manager.received_of(lease_messages.ReturnSlots) == []
    second.release()
    await until(lambda: bool(manager.received_of(lease_messages.ReturnSlots)))
    assert len(manager.received_of(lease_messages.Acquire)) == 1
    assert manager.received_of(lease_messages.ReturnSlots) == [lease_messages.ReturnSlots("m-1", 1000)]


async def test_an_instance_is_reused_only_for_what_it_does(leases: Leases, manager: FakeManager) -> None:
    manager.instances["m"] = InstanceInfo("m-1", "m", "vllm", "unix:/x", tasks=("generate",))
    first = await leases.acquire("m", "generate")
    manager.instances["m"] = InstanceInfo("m-2", "m", "vllm", "unix:/y", tasks=("embed",))
    second = await leases.acquire("m", "embed")
    assert (first.instance.id, second.instance.id) == ("m-1", "m-2")
    assert [one.task for one in manager.received_of(lease_messages.Acquire)] == ["generate", "embed"]
    again = [await leases.acquire("m", "embed"), await leases.acquire("m", "generate"), await leases.acquire("m")]
    assert [lease.instance.id for lease in again[:2]] == ["m-2", "m-1"]
    assert len(manager.received_of(lease_messages.Acquire)) == 2
    for lease in (first, second, *again):
        lease.release()


async def test_every_waiter_gets_its_own_grant_and_all_go_back_together(leases: Leases, manager: FakeManager) -> None:
    manager.hold = True
    waiting = [asyncio.create_task(leases.acquire("m")) for _ in range(3)]
    await until(lambda: len(manager.received_of(lease_messages.Acquire)) == 3)
    manager.grant_all()
    for lease in await asyncio.gather(*waiting):
        lease.release()
    await until(lambda: bool(manager.received_of(lease_messages.ReturnSlots)))
    assert manager.received_of(lease_messages.ReturnSlots) == [lease_messages.ReturnSlots("m-1", 3000)]


async def test_grant_that_crosses_a_cancel_goes_back(leases: Leases, manager: FakeManager) -> None:
    manager.hold = True
    waiting = asyncio.create_task(leases.acquire("m"))
    await until(lambda: bool(manager.received_of(lease_messages.Acquire)))
    manager.grant_all()
    waiting.cancel()
    await until(lambda: bool(manager.received_of(lease_messages.ReturnSlots)))
    assert manager.received_of(lease_messages.ReturnSlots) == [lease_messages.ReturnSlots("m-1", 1000)]


async def test_lease_that_was_granted_to_a_cancelled_task_goes_back(
    leases: Leases, link: ManagerLink, manager: FakeManager
) -> None:
    waiting = asyncio.create_task(leases.acquire("m"))
    await asyncio.sleep(0)
    link.on_message(lease_messages.Granted(1, manager.instances["m"]))
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await until(lambda: bool(manager.received_of(lease_messages.ReturnSlots)))


async def test_drained_instance_is_not_used_again_until_it_is_granted_again(
    leases: Leases, link: ManagerLink, manager: FakeManager
) -> None:
    first = await leases.acquire("m")
    link.on_message(lease_messages.RevokeSlots("m-1"))
    await until(lambda: manager.received_of(lease_messages.ReturnSlots) == [lease_messages.ReturnSlots("m-1", 999)])
    second = await leases.acquire("m")
    third = await leases.acquire("m")
    assert len(manager.received_of(lease_messages.Acquire)) == 2
    for lease in (first, second, third):
        lease.release()
    await until(lambda: len(manager.received_of(lease_messages.ReturnSlots)) == 2)
    assert manager.received_of(lease_messages.ReturnSlots)[1:] == [lease_messages.ReturnSlots("m-1", 1001)]


async def test_places_that_others_wait_for_go_back_one_by_one(leases: Leases, manager: FakeManager) -> None:
    manager.slots, manager.until_revoked = 1, False
    claim = lease_messages.Claim("key", cost=100)
    first, second = await leases.acquire("m", claim=claim), await leases.acquire("m", claim=claim)
    assert len(manager.received_of(lease_messages.Acquire)) == 2
    first.release(130)
    await until(lambda: len(manager.received_of(lease_messages.ReturnSlots)) == 1)
    second.release()
    await until(lambda: len(manager.received_of(lease_messages.ReturnSlots)) == 2)
    assert manager.received_of(lease_messages.ReturnSlots) == [
        lease_messages.ReturnSlots("m-1", 1, [lease_messages.EndedRequest("key", 30)]),
        lease_messages.ReturnSlots("m-1", 1, [lease_messages.EndedRequest("key")]),
    ]


async def test_what_ran_from_kept_places_counts_when_they_are_reclaimed(
    leases: Leases, link: ManagerLink, manager: FakeManager
) -> None:
    first = await leases.acquire("m", claim=lease_messages.Claim("asked", cost=5))
    second = leases.acquire_at_once("m", None, "kept")
    assert second is not None
    link.on_message(lease_messages.RevokeSlots("m-1"))
    assert leases.acquire_at_once("m", None, "kept") is None
    second.release(40)
    first.release(5)
    await until(lambda: len(manager.received_of(lease_messages.ReturnSlots)) == 3)
    assert [one.ended for one in manager.received_of(lease_messages.ReturnSlots)] == [
        [],
        [lease_messages.EndedRequest("kept", 40)],
        [lease_messages.EndedRequest("asked", 0)],
    ]


async def test_a_waiter_hears_where_it_stands(leases: Leases, link: ManagerLink, manager: FakeManager) -> None:
    manager.hold = True
    heard: list[int] = []
    waiting = asyncio.create_task(leases.acquire("m", on_position=heard.append))
    await until(lambda: bool(manager.received_of(lease_messages.Acquire)))
    link.on_message(lease_messages.Queued(1, 3))
    link.on_message(lease_messages.Queued(99, 1))
    manager.grant_all()
    (await waiting).release()
    assert heard == [3]


async def test_broken_instance_is_asked_for_again(leases: Leases, manager: FakeManager) -> None:
    first, second = await leases.acquire("m"), await leases.acquire("m")
    first.release(is_broken=True)
    third = await leases.acquire("m")
    assert len(manager.received_of(lease_messages.Acquire)) == 2
    second.release()
    third.release()


async def test_refusal_is_raised_with_its_code(leases: Leases, manager: FakeManager) -> None:
    manager.refusal = lambda request: messages.Refused(request, "model_load_failed", "no room", 3, should_retry=False)
    with pytest.raises(ModelLoadFailed) as caught:
        await leases.acquire("m")
    assert (caught.value.message, caught.value.retry_after, caught.value.should_retry) == ("no room", 3, False)
    with pytest.raises(ModelLoadFailed):
        await leases.load("m", wait=True)


async def test_waiters_outlive_the_manager(leases: Leases, link: ManagerLink, manager: FakeManager) -> None:
    manager.hold = True
    waiting = asyncio.create_task(leases.acquire("m", "embed"))
    await until(lambda: bool(manager.received_of(lease_messages.Acquire)))
    await manager.stop()
    await until(lambda: not link.is_connected)
    manager.hold = False
    await manager.start()
    (await waiting).release()
    assert manager.received_of(lease_messages.Acquire) == [lease_messages.Acquire(1, "m", "embed")] * 2


async def test_commands_wait_for_a_manager(leases: Leases, link: ManagerLink, manager: FakeManager) -> None:
    await manager.stop()
    await until(lambda: not link.is_connected)
    asked = asyncio.create_task(leases.list_models())
    await asyncio.sleep(0.05)
    await manager.start()
    assert [model.id for model in await asked] == ["m"]


async def test_a_command_that_a_manager_may_have_begun_is_refused_when_that_is_lost(
    leases: Leases, manager: FakeManager
) -> None:
    manager.answers_commands = False
    asked = asyncio.create_task(leases.load("m", wait=True))
    await until(lambda: bool(manager.received_of(messages.LoadModel)))
    await manager.stop()
    with pytest.raises(EngineUnavailable):
        await asked


async def test_who_has_left_gives_back_what_it_is_granted(
    leases: Leases, link: ManagerLink, manager: FakeManager
) -> None:
    """Also what is known of it: the key that has a request running, the prompt that is being read."""
    manager.hold = True
    waiting = asyncio.create_task(leases.acquire("m", claim=lease_messages.Claim("key", prefill_tokens=100)))
    await until(lambda: bool(manager.received_of(lease_messages.Acquire)))
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    link.on_message(lease_messages.Granted(1, manager.instances["m"], 1, until_revoked=False, key_id="key"))
    await until(lambda: bool(manager.received_of(lease_messages.ReturnSlots)))
    assert manager.received_of(lease_messages.PrefillDone) == [lease_messages.PrefillDone(1)]
    assert manager.received_of(lease_messages.ReturnSlots) == [
        lease_messages.ReturnSlots("m-1", 1, [lease_messages.EndedRequest("key")])
    ]


async def test_waiters_are_refused_when_no_manager_comes(manager: FakeManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONNECT_TIMEOUT", 0.1)
    await manager.stop()
    asked: list[float] = []
    link = ManagerLink(manager.run_dir, asked.append)
    one = Leases(link)
    await link.start()
    with pytest.raises(EngineUnavailable):
        await one.acquire("m")
    assert asked
    await link.close()


async def test_closing_refuses_waiters_and_newcomers(manager: FakeManager) -> None:
    link = ManagerLink(manager.run_dir, lambda _: None)
    one = Leases(link)
    manager.hold = True
    await link.start()
    waiting = asyncio.create_task(one.acquire("m"))
    await until(lambda: bool(manager.received_of(lease_messages.Acquire)))
    await link.close()
    for attempt in (waiting, one.acquire("m")):
        with pytest.raises(ShuttingDown):
            await attempt


async def test_reports_name_what_is_in_flight(leases: Leases, manager: FakeManager) -> None:
    first, second = await leases.acquire("m"), await leases.acquire("m")
    await until(lambda: lease_messages.ReportInFlight({"m-1": 2}) in manager.received)
    first.release()
    second.release()
    await until(lambda: lease_messages.ReportInFlight({"m-1": 0}) in manager.received)


async def test_traffic_with_short_gaps_asks_once_and_a_drain_ends_it_at_once(
    leases: Leases, link: ManagerLink, manager: FakeManager
) -> None:
    for _ in range(5):
        (await leases.acquire("m")).release()
        await asyncio.sleep(0.02)
    assert len(manager.received_of(lease_messages.Acquire)) == 1
    assert not manager.received_of(lease_messages.ReturnSlots)
    link.on_message(lease_messages.RevokeSlots("m-1"))
    await until(lambda: bool(manager.received_of(lease_messages.ReturnSlots)))


def test_manager_process_is_started_once_and_again_when_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!{sys.executable}\nimport sys; open({str(tmp_path / 'ran')!r}, 'a').write('x'); sys.exit(3)\n")
    fake.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(fake))
    process = ManagerProcess(Config(source=tmp_path / "config.yaml", server=ServerConfig(run_dir=str(tmp_path))))
    process.ensure_started(100.0)
    process.ensure_started(100.5)
    wait_for(process)
    process.ensure_started(101.0)
    assert (tmp_path / "ran").read_text() == "x"
    process.ensure_started(103.0)
    wait_for(process)
    assert (tmp_path / "ran").read_text() == "xx"


def wait_for(process: ManagerProcess) -> None:
    if process._process is not None:  # else it was seen to have ended already
        process._process.wait()

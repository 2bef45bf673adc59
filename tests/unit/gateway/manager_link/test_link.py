"""The worker's connection to the manager over losses and restarts, against the fake manager on a real socket."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llm_api_server.config.models import Config, ServerConfig
from llm_api_server.errors import EngineUnavailable, ShuttingDown
from llm_api_server.gateway.manager_link.leases import Leases
from llm_api_server.gateway.manager_link.link import ManagerLink, ManagerProcess
from llm_api_server.gateway.manager_link.model_commands import ModelCommands
from llm_api_server.ipc.lease_messages import Acquire
from llm_api_server.ipc.messages import ListModels, LoadModel
from tests.fake_manager import FakeManager
from tests.waiting import until

pytestmark = pytest.mark.anyio


@pytest.fixture
async def leases(link: ManagerLink) -> AsyncIterator[Leases]:
    one = Leases(link)
    await link.start()
    await until(lambda: one.models)
    yield one
    one.close()


async def test_waiters_outlive_the_manager(leases: Leases, link: ManagerLink, manager: FakeManager) -> None:
    manager.hold = True
    waiting = asyncio.create_task(leases.acquire("m", "embed"))
    await until(lambda: manager.received_of(Acquire))
    await manager.stop()
    await until(lambda: not link.is_connected)
    manager.hold = False
    await manager.start()
    (await waiting).release()
    assert manager.received_of(Acquire) == [Acquire(1, "m", "embed")] * 2


async def test_commands_wait_for_a_manager(link: ManagerLink, manager: FakeManager) -> None:
    await manager.stop()
    await link.start()
    listing = asyncio.create_task(ModelCommands(link).list_models())
    await asyncio.sleep(0)
    await manager.start()
    assert [model.id for model in await listing] == ["m"]
    assert len(manager.received_of(ListModels)) == 1


async def test_a_command_that_a_lost_manager_may_have_begun_is_refused(link: ManagerLink, manager: FakeManager) -> None:
    manager.replies_to_commands = False
    await link.start()
    loading = asyncio.create_task(ModelCommands(link).load("m", wait=True))
    await until(lambda: manager.received_of(LoadModel))
    await manager.stop()
    with pytest.raises(EngineUnavailable):
        await loading


async def test_waiters_are_refused_when_no_manager_starts(manager: FakeManager) -> None:
    await manager.stop()
    starts: list[float] = []
    link = ManagerLink(manager.run_dir, starts.append, connect_timeout=0.1)
    leases = Leases(link)
    await link.start()
    with pytest.raises(EngineUnavailable):
        await leases.acquire("m")
    assert starts
    await link.close()


async def test_closing_refuses_waiters_and_newcomers(link: ManagerLink, manager: FakeManager) -> None:
    leases = Leases(link)
    manager.hold = True
    await link.start()
    waiting = asyncio.create_task(leases.acquire("m"))
    await until(lambda: manager.received_of(Acquire))
    await link.close()
    for attempt in (waiting, leases.acquire("m")):
        with pytest.raises(ShuttingDown):
            await attempt


def test_a_manager_process_is_started_once_and_again_after_it_ended(
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
    if process._process is not None:  # otherwise it was reaped already
        process._process.wait()

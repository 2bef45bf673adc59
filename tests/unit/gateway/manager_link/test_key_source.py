"""Keys looked up over a worker's link, against the fake manager on a real socket."""

from __future__ import annotations

import pytest

from llm_api_server.auth.access import Key, Limits
from llm_api_server.gateway.manager_link.key_source import KeySource
from llm_api_server.gateway.manager_link.link import ManagerLink
from tests.fake_manager import FakeManager
from tests.waiting import until

pytestmark = pytest.mark.anyio


async def test_keys_are_found_and_forgotten_when_they_change_or_may_have(
    link: ManagerLink, manager: FakeManager
) -> None:
    limits = Limits(requests_per_minute=10)
    key = Key("bob", "id-of-bob", frozenset({"chat"}), limits=limits, networks=("10.0.0.0/8",), expires_at=5.0)
    manager.keys = {"d" * 64: key, "id-of-bob": key}
    source = KeySource(link)
    forgotten: list[object] = []
    source.when_changed(forgotten.append)
    await link.start()
    assert await source.find(digest="d" * 64) == key
    assert await source.find(key_id="id-of-bob") == key
    assert await source.find(digest="e" * 64) is None
    assert forgotten == [None]
    manager.change_keys(["id-of-bob"])
    await until(lambda: len(forgotten) == 2)
    assert forgotten[1] == ["id-of-bob"]
    await manager.stop()
    await manager.start()
    await until(lambda: len(forgotten) == 3)
    assert forgotten[2] is None

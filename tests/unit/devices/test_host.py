"""Memory and cores of this machine."""

from __future__ import annotations

from llm_api_server.devices.host import this_host


def test_this_host_has_memory_and_cores() -> None:
    host = this_host()
    assert host.memory_bytes > 2**28
    assert host.cores >= 1

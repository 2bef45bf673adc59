"""The manager's end of a control connection."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from llm_api_server.ipc import messages
from llm_api_server.ipc.framing import encode
from llm_api_server.manager.server import ControlConnection

pytestmark = pytest.mark.anyio


class Exposition:
    async def text(self) -> str:
        raise ValueError("secret detail")


class Transport(asyncio.Transport):
    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sent.append(bytes(data))

    def is_closing(self) -> bool:
        return False


async def test_a_command_whose_work_fails_is_answered() -> None:
    nothing: Any = SimpleNamespace(connected=lambda _client: None)
    connection = ControlConnection(
        manager=nothing,
        admissions=nothing,
        usage=nothing,
        keys=nothing,
        reloading=nothing,
        exposition=cast("Any", Exposition()),
        downloads=nothing,
        on_shutdown=nothing,
    )
    transport = Transport()
    connection.connection_made(transport)
    connection.data_received(encode(messages.GetMetrics(7)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    (answer,) = messages.to_client_decoder().feed(b"".join(transport.sent))
    assert isinstance(answer, messages.Refused)
    assert (answer.request, answer.code) == (7, "internal_error")
    assert "secret" not in answer.message

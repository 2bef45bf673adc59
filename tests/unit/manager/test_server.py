"""The manager's end of a control connection."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from llm_api_server.ipc import messages
from llm_api_server.ipc.framing import encode
from llm_api_server.manager.server import ControlServer

pytestmark = pytest.mark.anyio


class Anything(SimpleNamespace):
    """Stands for a part of the manager that the test does not use."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


class FailingExposition:
    async def text(self) -> str:
        raise ValueError("secret detail")


class Transport(asyncio.Transport):
    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sent.append(bytes(data))

    def is_closing(self) -> bool:
        return False


def server() -> ControlServer:
    part: Any = Anything()
    exposition: Any = FailingExposition()
    return ControlServer(
        manager=part,
        admissions=part,
        usage=part,
        keys=part,
        reloader=part,
        exposition=exposition,
        downloads=part,
        on_shutdown=part,
    )


def test_every_message_to_the_manager_has_a_handler() -> None:
    assert set(server().handlers) == set(get_args(messages.ToManager))


async def test_a_command_whose_work_fails_gets_an_error_response() -> None:
    connection, transport = server().connection(), Transport()
    connection.connection_made(transport)
    connection.data_received(encode(messages.GetMetrics(7)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    (response,) = messages.to_client_decoder().feed(b"".join(transport.sent))
    assert isinstance(response, messages.Refused)
    assert (response.request, response.code) == (7, "internal_error")
    assert "secret" not in response.message

"""A worker whose loop is busy still lets many clients in."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
import uvloop

from llm_api_server.gateway.listeners import ACCEPTS_PER_TURN, repeated

CLIENTS = 64


async def turns_until_all_are_in(listeners: list[socket.socket]) -> int:
    """How often the loop turns until `CLIENTS` that have connected before are accepted."""
    loop = asyncio.get_running_loop()
    accepted: list[asyncio.BaseTransport] = []

    class Protocol(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            accepted.append(transport)

    address = listeners[0].getsockname()
    clients: list[Any] = [socket.create_connection(address) for _ in range(CLIENTS)]
    servers = [await loop.create_server(Protocol, sock=listener) for listener in listeners]
    turns = 0
    while len(accepted) < CLIENTS:
        await asyncio.sleep(0)
        turns += 1
    for end in [*clients, *accepted, *servers]:
        end.close()
    return turns


@pytest.mark.parametrize("is_repeated", [True, False])
def test_connections_that_wait_are_accepted_several_in_a_turn(is_repeated: bool) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=CLIENTS) as listener:
        listeners = repeated(listener) if is_repeated else [listener]
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            turns = runner.run(turns_until_all_are_in(listeners))
    if is_repeated:
        assert turns <= 2 * CLIENTS / ACCEPTS_PER_TURN
    else:
        assert turns >= CLIENTS / 2, "the loop has learnt to accept more: the repetition can go"

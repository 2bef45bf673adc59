"""A busy worker accepts connections quickly; several workers share them evenly."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from llm_api_server.event_loop.accept_loop import MAX_ACCEPTS, Acceptor, Loop

CLIENTS = 64


class Protocol(asyncio.Protocol):
    """Counts its instances by `worker`."""

    def __init__(self, made: Counter[int], worker: int = 0) -> None:
        self._made = made
        self._worker = worker

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._made[self._worker] += 1


def run(test: Callable[[socket.socket], Any]) -> Any:
    with (
        socket.create_server(("127.0.0.1", 0), backlog=CLIENTS) as listener,
        asyncio.Runner(loop_factory=Loop) as runner,
    ):
        return runner.run(test(listener))


def test_a_worker_without_siblings_accepts_many_connections_per_iteration() -> None:
    async def iterations(listener: socket.socket) -> int:
        made: Counter[int] = Counter()
        clients = [socket.create_connection(listener.getsockname()) for _ in range(CLIENTS)]
        server = await asyncio.get_running_loop().create_server(partial(Protocol, made), sock=listener)
        count = 0
        while made.total() < CLIENTS:
            await asyncio.sleep(0)
            count += 1
        server.close()
        await server.wait_closed()
        for client in clients:
            client.close()
        return count

    assert run(iterations) <= 3 * CLIENTS / MAX_ACCEPTS


@pytest.mark.parametrize("is_burst", [True, False])
def test_connections_spread_evenly_over_workers(is_burst: bool) -> None:
    workers = 4

    async def spread(listener: socket.socket) -> Counter[int]:
        loop = asyncio.get_running_loop()
        made: Counter[int] = Counter()
        clients: list[socket.socket] = []
        listeners = [listener.dup() for _ in range(workers)]
        acceptors = [
            Acceptor(loop, partial(Protocol, made, worker), listeners[worker], siblings=workers - 1)
            for worker in range(workers)
        ]
        for number in range(CLIENTS):
            clients.append(socket.create_connection(listener.getsockname()))
            while not is_burst and made.total() <= number:
                await asyncio.sleep(0)
        while made.total() < CLIENTS:
            await asyncio.sleep(0)
        ends: list[Any] = [*acceptors, *listeners, *clients]
        for end in ends:
            end.close()
        return made

    made = run(spread)
    assert len(made) == workers
    assert min(made.values()) >= CLIENTS / workers / 2


def test_without_descriptors_connections_wait() -> None:
    class Exhausted(socket.socket):
        """Fails the first time."""

        failed = False

        def accept(self) -> tuple[socket.socket, Any]:
            if not self.failed:
                self.failed = True
                raise OSError(errno.EMFILE, "Too many open files")
            return super().accept()

    async def test(listener: socket.socket) -> int:
        exhausted = Exhausted(fileno=listener.dup().detach())
        made: Counter[int] = Counter()
        loop = asyncio.get_running_loop()
        acceptor = Acceptor(loop, partial(Protocol, made), exhausted, siblings=0, retry_interval=0.01)
        with socket.create_connection(listener.getsockname()):
            while not made:
                await asyncio.sleep(0.01)
        acceptor.close()
        acceptor.close()
        exhausted.close()
        return made.total()

    assert run(test) == 1

"""The event loop of a worker: uvloop's, with a way of its own to let connections in.

libuv takes one connection per turn of its loop, so that clients who come together wait for as many turns, and whichever
worker happens to be awake takes most of them. Here a worker takes several in a turn; one that has siblings goes behind
them after each that it took, so that connections spread evenly.
"""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
from collections.abc import Callable
from typing import Any

import uvloop
from loguru import logger

#: Set for workers: how many listen on the same sockets.
WORKERS = "LLM_API_SERVER_WORKERS"
#: Taken in one turn by a worker alone ...
MOST_AT_ONCE = 16
#: ... and by one of several that has gone behind: where it still finds some, the others are busy.
MOST_OF_SEVERAL = 4
#: Seconds that one step behind the others lasts; libuv's timers have no smaller ones.
STEP = 0.001
MOST_STEPS = 8
#: The part of a process's descriptors that its clients may take; who is in needs others, to reach an engine.
SHARE_OF_DESCRIPTORS = 3 / 4
#: Without descriptors left, connections wait outside for so many seconds.
RETRY_INTERVAL = 1.0


class Loop(uvloop.Loop):
    """For uvicorn's `loop`: servers on sockets that were opened before are `Acceptor`s."""

    async def create_server(self, protocol_factory: Any, *args: Any, **options: Any) -> Any:
        listener = options.get("sock")
        if listener is None or options.get("ssl") is not None:
            return await super().create_server(protocol_factory, *args, **options)
        return Acceptor(self, protocol_factory, listener, siblings=int(os.environ.get(WORKERS, "1")) - 1)


class Acceptor:
    """Lets in who connects to `listener`, which `siblings` other processes listen on as well.

    In the place of asyncio's server, as far as uvicorn uses that.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        protocol_factory: Callable[[], asyncio.BaseProtocol],
        listener: socket.socket,
        *,
        siblings: int,
    ) -> None:
        self._loop = loop
        self._factory = protocol_factory
        self._listener = listener
        self._siblings = min(siblings, MOST_STEPS)
        #: How many of the next connections are for others.
        self._behind = 0
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_closed = False
        listener.settimeout(0)
        loop.add_reader(listener.fileno(), self._on_ready)

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        else:
            self._loop.remove_reader(self._listener.fileno())

    async def wait_closed(self) -> None:
        """Nothing of it outlives `close`."""

    def _on_ready(self) -> None:
        if self._behind:
            self._pause(self._behind * STEP)
        else:
            self._take(1 if self._siblings else MOST_AT_ONCE)

    def _pause(self, seconds: float) -> None:
        self._loop.remove_reader(self._listener.fileno())
        self._timer = self._loop.call_later(seconds, self._resume)

    def _resume(self) -> None:
        self._timer = None
        self._loop.add_reader(self._listener.fileno(), self._on_ready)
        self._take(MOST_OF_SEVERAL)

    def _take(self, most: int) -> None:
        taken = 0
        try:
            while taken < most:
                _check_descriptors(self._listener)
                connection, _ = self._listener.accept()
                self._serve(connection)
                taken += 1
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            pass
        except OSError as error:
            logger.error("connections wait: {}", error.strerror)
            self._pause(RETRY_INTERVAL)
        if taken:
            self._behind = self._siblings
        elif self._behind:
            self._behind -= 1

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(0)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        task = self._loop.create_task(self._loop.connect_accepted_socket(self._factory, connection))
        self._tasks.add(task)
        task.add_done_callback(self._on_served)

    def _on_served(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            logger.debug("a connection was lost at once: {}", error)
        elif self._is_closed:  # it was on its way in when the others were told
            task.result()[1].shutdown()


def _check_descriptors(listener: socket.socket) -> None:
    """Raises the error of a system that has none left a while before it has none."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(listener.fileno())
    os.close(lowest_free)
    if limit != resource.RLIM_INFINITY and lowest_free >= limit * SHARE_OF_DESCRIPTORS:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

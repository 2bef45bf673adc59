"""Event loop of a worker: uvloop's, but it accepts several connections per iteration and shares them with siblings.

libuv accepts one connection per iteration, so a burst of clients waits for as many iterations, and the worker that
happens to be awake gets most of them. Here a worker without siblings accepts many per iteration; one with siblings
steps back after each, so that connections spread evenly: of 64 connections to four workers 14 to 18 each, instead of
2 to 49 (tests/unit/event_loop/test_accept_loop.py).
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

#: Environment variable of workers: how many of them listen on the same sockets.
WORKERS = "LLM_API_SERVER_WORKERS"
#: Connections that a worker without siblings accepts per iteration.
MAX_ACCEPTS = 16
#: Connections that a worker accepts at once after stepping back: those that no sibling has taken meanwhile.
MAX_ACCEPTS_AFTER_STEPS = 4
#: Seconds of one step back; libuv's timers have no finer resolution.
STEP = 0.001
MAX_STEPS = 8
#: Share of the process's descriptors that clients may use; the rest is for connections to engines.
CLIENT_DESCRIPTORS = 3 / 4
#: Seconds between two tries to accept while no descriptor is left.
RETRY_INTERVAL = 1.0


class Loop(uvloop.Loop):
    """uvloop's loop for uvicorn's option `loop`; its servers on sockets that are open already are `Acceptor`s."""

    async def create_server(self, protocol_factory: Any, *args: Any, **options: Any) -> Any:
        listener = options.get("sock")
        if listener is None or options.get("ssl") is not None:
            return await super().create_server(protocol_factory, *args, **options)
        return Acceptor(self, protocol_factory, listener, siblings=int(os.environ.get(WORKERS, "1")) - 1)


class Acceptor:
    """Accepts connections on `listener`, on which `siblings` other processes listen as well.

    Has the part of asyncio's server that uvicorn uses.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        protocol_factory: Callable[[], asyncio.BaseProtocol],
        listener: socket.socket,
        *,
        siblings: int,
        retry_interval: float = RETRY_INTERVAL,
    ) -> None:
        self._loop = loop
        self._factory = protocol_factory
        self._listener = listener
        self._siblings = min(siblings, MAX_STEPS)
        self._retry_interval = retry_interval
        #: Steps to wait before the next connection.
        self._steps = 0
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
        """Return at once: nothing outlives `close`."""

    def _on_ready(self) -> None:
        if self._steps:
            self._pause(self._steps * STEP)
        else:
            self._accept(1 if self._siblings else MAX_ACCEPTS)

    def _pause(self, seconds: float) -> None:
        self._loop.remove_reader(self._listener.fileno())
        self._timer = self._loop.call_later(seconds, self._resume)

    def _resume(self) -> None:
        self._timer = None
        self._loop.add_reader(self._listener.fileno(), self._on_ready)
        self._accept(MAX_ACCEPTS_AFTER_STEPS)

    def _accept(self, limit: int) -> None:
        accepted = 0
        try:
            while accepted < limit:
                _check_descriptors(self._listener)
                connection, _ = self._listener.accept()
                self._serve(connection)
                accepted += 1
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            pass
        except OSError as error:
            logger.error("connections wait: {}", error.strerror)
            self._pause(self._retry_interval)
        if accepted:
            self._steps = self._siblings
        elif self._steps:
            self._steps -= 1

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
            logger.debug("a connection was lost right after it was accepted: {}", error)
        elif self._is_closed:  # its protocol was made after the server had shut down all others
            task.result()[1].shutdown()


def _check_descriptors(listener: socket.socket) -> None:
    """Raise `EMFILE` before the process really runs out of descriptors."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(listener.fileno())
    os.close(lowest_free)
    if limit != resource.RLIM_INFINITY and lowest_free >= limit * CLIENT_DESCRIPTORS:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

"""Writes of one loop iteration are sent at its end, in order, whatever else happens to the connection."""

from __future__ import annotations

import asyncio
import socket

import pytest

from llm_api_server.event_loop.write_buffer import MAX_HELD, BufferedTransport, WriteBuffer

pytestmark = pytest.mark.anyio


class Recording(asyncio.Transport):
    """Transport that records its calls in `log`, which several may share."""

    def __init__(self, log: list[str], name: str = "") -> None:
        super().__init__()
        self._log, self._name = log, name
        self.is_lost = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._log.append(self._name + bytes(data).decode())

    def close(self) -> None:
        self._log.append(self._name + "closed")

    def abort(self) -> None:
        self._log.append(self._name + "aborted")

    def is_closing(self) -> bool:
        return self.is_lost


async def end_of_iteration() -> None:
    await asyncio.sleep(0)


async def test_writes_of_an_iteration_are_sent_at_its_end_once_per_connection() -> None:
    log: list[str] = []
    buffer = WriteBuffer()
    one, other = (buffer.wrap(Recording(log, name)) for name in ("1:", "2:"))
    one.write(b"a")
    other.write(b"b")
    one.write(bytearray(b"c"))
    other.write(b"")
    assert log == []
    await end_of_iteration()
    assert log == ["1:ac", "2:b"]
    other.write(b"d")
    await end_of_iteration()
    assert log[2:] == ["2:d"]


async def test_an_empty_write_sends_nothing() -> None:
    log: list[str] = []
    WriteBuffer().wrap(Recording(log)).write(b"")
    await end_of_iteration()
    assert log == []


async def test_close_sends_held_data_and_abort_drops_it() -> None:
    log: list[str] = []
    buffer = WriteBuffer()
    closed, aborted = (buffer.wrap(Recording(log, name)) for name in ("1:", "2:"))
    for transport in (closed, aborted):
        transport.write(b"a")
    closed.close()
    aborted.abort()
    await end_of_iteration()
    assert log == ["1:a", "1:closed", "2:aborted"]


async def test_a_lost_connection_does_not_keep_data_from_others() -> None:
    log: list[str] = []
    buffer = WriteBuffer()
    lost = Recording(log, "1:")
    dead, alive = buffer.wrap(lost), buffer.wrap(Recording(log, "2:"))
    dead.write(b"a")
    alive.write(b"b")
    lost.is_lost = True
    await end_of_iteration()
    assert log == ["2:b"]
    assert dead.is_closing()


async def test_full_buffer_is_sent_before_the_end_of_the_iteration() -> None:
    log: list[str] = []
    buffer = WriteBuffer()
    for number in range(MAX_HELD + 1):
        BufferedTransport(buffer, Recording(log)).write(b"%d" % number)
    assert log == [str(number) for number in range(MAX_HELD)]
    await end_of_iteration()
    assert len(log) == MAX_HELD + 1


async def test_all_other_methods_reach_the_wrapped_transport() -> None:
    left, right = socket.socketpair()
    transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=left)
    buffered = WriteBuffer().wrap(transport)
    got: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    class Reader(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            got.set_result(data)

    buffered.set_protocol(Reader())
    buffered.pause_reading()
    assert not transport.is_reading()
    right.send(b"hello")
    buffered.resume_reading()
    assert await got == b"hello"
    assert buffered.get_extra_info("socket") is not None
    assert buffered.get_extra_info("nothing", "else") == "else"
    buffered.close()
    right.close()
    assert buffered.is_closing()

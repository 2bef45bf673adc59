"""What is written in one turn goes out at its end, in order, whatever else happens to the connection."""

from __future__ import annotations

import asyncio
import socket

import pytest

from llm_api_server.event_loop.write_buffer import MOST_HELD, BufferedTransport, WriteBuffer

pytestmark = pytest.mark.anyio


class Recording(asyncio.Transport):
    """Notes what it is told; `log` may be that of several."""

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


async def end_of_turn() -> None:
    await asyncio.sleep(0)


async def test_writes_of_a_turn_go_out_at_its_end_each_connection_once() -> None:
    log: list[str] = []
    turns = WriteBuffer()
    one, other = (turns.wrap(Recording(log, name)) for name in ("1:", "2:"))
    one.write(b"a")
    other.write(b"b")
    one.write(bytearray(b"c"))
    other.write(b"")
    assert log == []
    await end_of_turn()
    assert log == ["1:ac", "2:b"]
    other.write(b"d")
    await end_of_turn()
    assert log[2:] == ["2:d"]


async def test_nothing_is_written_where_nothing_was_said() -> None:
    log: list[str] = []
    WriteBuffer().wrap(Recording(log)).write(b"")
    await end_of_turn()
    assert log == []


async def test_to_close_waits_for_what_was_written_to_abort_does_not() -> None:
    log: list[str] = []
    turns = WriteBuffer()
    closed, aborted = (turns.wrap(Recording(log, name)) for name in ("1:", "2:"))
    for transport in (closed, aborted):
        transport.write(b"a")
    closed.close()
    aborted.abort()
    await end_of_turn()
    assert log == ["1:a", "1:closed", "2:aborted"]


async def test_a_lost_connection_gets_nothing_and_the_others_get_theirs() -> None:
    log: list[str] = []
    turns = WriteBuffer()
    lost = Recording(log, "1:")
    here, there = turns.wrap(lost), turns.wrap(Recording(log, "2:"))
    here.write(b"a")
    there.write(b"b")
    lost.is_lost = True
    await end_of_turn()
    assert log == ["2:b"]
    assert here.is_closing()


async def test_in_a_long_turn_the_first_do_not_wait_for_the_last() -> None:
    log: list[str] = []
    turns = WriteBuffer()
    for number in range(MOST_HELD + 1):
        BufferedTransport(turns, Recording(log)).write(b"%d" % number)
    assert log == [str(number) for number in range(MOST_HELD)]
    await end_of_turn()
    assert len(log) == MOST_HELD + 1


async def test_it_passes_everything_else_on() -> None:
    left, right = socket.socketpair()
    transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=left)
    late = WriteBuffer().wrap(transport)
    got: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    class Reader(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            got.set_result(data)

    late.set_protocol(Reader())
    late.pause_reading()
    right.send(b"hello")
    await asyncio.sleep(0.01)
    assert not got.done()
    late.resume_reading()
    assert await got == b"hello"
    assert late.get_extra_info("socket") is not None
    assert late.get_extra_info("nothing", "else") == "else"
    late.close()
    right.close()
    assert late.is_closing()

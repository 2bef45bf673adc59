"""What is written in one turn of the event loop goes out together, at its end.

A write wakes a process on another core, which costs more than the write, unless that process is awake from the write
before. Connections to clients and to engines write so, on the worker's event loop.
"""

from __future__ import annotations

import asyncio
from typing import Any

#: No more are held back: in a long turn the first need not wait for the last.
MOST_HELD = 32


class WriteBuffer:
    """Of one event loop."""

    def __init__(self) -> None:
        self._written: list[BufferedTransport] = []
        self._is_planned = False

    def wrap(self, transport: asyncio.BaseTransport) -> BufferedTransport:
        return BufferedTransport(self, transport)

    def add(self, transport: BufferedTransport) -> None:
        """Something was written to it for the first time in this turn."""
        if not self._is_planned:
            self._is_planned = True
            asyncio.get_running_loop().call_soon(self._end)
        self._written.append(transport)
        if len(self._written) >= MOST_HELD:
            self._flush()

    def _end(self) -> None:
        self._is_planned = False
        self._flush()

    def _flush(self) -> None:
        written, self._written = self._written, []
        for transport in written:
            transport.flush()


class BufferedTransport(asyncio.Transport):
    """In the place of a transport. To close it waits for what was written, to abort it does not."""

    def __init__(self, turns: WriteBuffer, transport: Any) -> None:
        super().__init__()
        self._turns = turns
        self._transport = transport
        self._held = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._held:
            self._held += data
        elif data:
            self._held = bytes(data)
            self._turns.add(self)

    def flush(self) -> None:
        """Without waiting for the end of the turn. What a lost connection would still get is dropped."""
        held, self._held = self._held, b""
        if held and not self._transport.is_closing():
            self._transport.write(held)

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def abort(self) -> None:
        self._held = b""
        self._transport.abort()

    def is_closing(self) -> bool:
        closing: bool = self._transport.is_closing()
        return closing

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._transport.set_protocol(protocol)

"""The listening socket as a busy event loop needs it."""

from __future__ import annotations

import socket

#: libuv accepts one connection per listening socket in a turn of its loop. A turn of a busy worker takes tens of
#: milliseconds; a thousand clients that connect at once would wait for most of a minute.
ACCEPTS_PER_TURN = 8


def repeated(listener: socket.socket) -> list[socket.socket]:
    """The same queue of connections under several descriptors, for as many to be accepted in a turn."""
    return [listener, *(listener.dup() for _ in range(ACCEPTS_PER_TURN - 1))]

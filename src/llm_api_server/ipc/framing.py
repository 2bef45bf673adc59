"""Messages on a byte stream: each a 4-byte big-endian length and msgpack. Used by both ends of the control socket."""

from __future__ import annotations

import struct
from typing import Any, Generic, TypeVar

import msgspec

from llm_api_server.errors import ControlError

#: A configuration with very many keys is the longest.
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
MessageT = TypeVar("MessageT")
_LENGTH = struct.Struct(">I")

_encoder = msgspec.msgpack.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    """One framed message."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


class FrameDecoder(Generic[MessageT]):
    """Cuts a byte stream into messages of one type. Raises `ControlError` on a message that is too long or wrong."""

    def __init__(self, message_type: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[MessageT] = msgspec.msgpack.Decoder(message_type)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[MessageT]:
        self._buffer += data
        messages: list[MessageT] = []
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MAX_MESSAGE_BYTES:
                raise ControlError(f"control message of {length} bytes is over the limit")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                break
            try:
                messages.append(self._decoder.decode(bytes(self._buffer[_LENGTH.size : end])))
            except msgspec.ValidationError as error:
                raise ControlError(f"unknown control message: {error}") from error
            del self._buffer[:end]
        return messages

"""Messages on a byte stream: a 4-byte big-endian length, then msgpack."""

from __future__ import annotations

import struct
from typing import Any, Generic, TypeVar

import msgspec

from llm_api_server.errors import ControlError

#: The longest message is a configuration with very many keys.
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
MessageT = TypeVar("MessageT")
_LENGTH = struct.Struct(">I")

_encoder = msgspec.msgpack.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    """Return the framed message."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


class FrameDecoder(Generic[MessageT]):
    """Splits a byte stream into messages of one type (a union of structs)."""

    def __init__(self, message_type: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[MessageT] = msgspec.msgpack.Decoder(message_type)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[MessageT]:
        """Return the messages that are complete. Raises `ControlError` on one that is too long or invalid."""
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

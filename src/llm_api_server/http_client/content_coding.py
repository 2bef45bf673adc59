"""Decoders of compressed bodies (RFC 9110, section 8.4.1), as far as the standard library has them. Pure."""

from __future__ import annotations

import zlib

#: Decoded bytes of one read of the socket; more is an attack.
MAX_DECODED_BYTES = 64 * 1024 * 1024
_GZIP_START, _ZLIB_HEADER_BYTES = b"\x1f", 2
_GZIP, _ZLIB, _RAW = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS


class CodingError(Exception):
    """The body is not in the coding that its header names, or decodes to too much."""


class Decoder:
    """Decoder of one body in `gzip` or `deflate`. `decode` returns what can be decoded so far."""

    def __init__(self, coding: str) -> None:
        self._is_gzip = coding == "gzip"
        self._inflate = zlib.decompressobj(_GZIP if self._is_gzip else _ZLIB)
        self._has_begun = False
        #: First byte of a deflated body, which does not decide whether it has a header.
        self._held = b""

    def decode(self, data: bytes) -> bytes:
        """Raises `CodingError`."""
        decoded = []
        size = 0
        try:
            while data:
                decoded.append(self._next(data, MAX_DECODED_BYTES - size + 1))
                size += len(decoded[-1])
                if size > MAX_DECODED_BYTES:
                    raise CodingError("the decoded body is too long")
                # A gzip body may have several members.
                data = self._inflate.unused_data if self._is_gzip else b""
                if data.startswith(_GZIP_START):
                    self._inflate = zlib.decompressobj(_GZIP)
                else:  # padding
                    data = b""
        except zlib.error as error:
            raise CodingError(str(error)) from error
        return b"".join(decoded)

    def _next(self, data: bytes, limit: int) -> bytes:
        if not self._has_begun and not self._is_gzip:
            data = self._held = self._held + data
            if len(data) < _ZLIB_HEADER_BYTES:
                return b""
            if not _has_zlib_header(data):  # some servers leave out the header that the RFC demands
                self._inflate = zlib.decompressobj(_RAW)
        self._has_begun = True
        return self._inflate.decompress(data, limit)

    def finish(self) -> None:
        """Raise `CodingError` if the body is cut off."""
        if (self._has_begun or self._held) and not self._inflate.eof:
            raise CodingError("the compressed body is cut off")


def _has_zlib_header(data: bytes) -> bool:
    """RFC 1950, section 2.2."""
    return data[0] & 0x0F == zlib.DEFLATED and int.from_bytes(data[:2]) % 31 == 0


def decoder_for(coding: str) -> Decoder | None:
    """Return a decoder of the value of a `content-encoding`; None if there is none for it."""
    name = coding.strip().lower().removeprefix("x-")
    return Decoder(name) if name in ("gzip", "deflate") else None


def is_identity(coding: str) -> bool:
    """Return whether the body is not encoded."""
    return coding.strip().lower() in ("", "identity")

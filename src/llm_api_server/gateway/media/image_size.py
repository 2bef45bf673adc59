"""Width and height of an image from its first bytes, without decoding it. Pure.

A few bytes can announce gigabytes of pixels, for which an engine would allocate memory before it notices. The fields
read here are those from which decoders (Pillow, libjpeg, libwebp, stb_image) take the size.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from types import MappingProxyType

Size = tuple[int, int]

#: JPEG markers of a frame header, which has the size; the gaps are tables (DHT, JPG, DAC).
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_SCAN, _JPEG_FILLING = 0xDA, 0xFF
_JPEG_WITHOUT_LENGTH = frozenset({0x00, 0x01, *range(0xD0, 0xD9)})
_GIF_EXTENSION, _GIF_IMAGE = 0x21, 0x2C
_GIF_HAS_PALETTE = 0x80
_OLD_BMP_HEADER = 12
#: Parts of a header that are read at most: more than any real one has, so a forged one cannot keep the gateway busy.
_MAX_STEPS = 5000


class BrokenImage(Exception):
    """The header cannot be read or has no size."""


def read_size(content: bytes) -> Size | None:
    """Return width and height, or None for anything but PNG, JPEG, GIF, WebP and BMP. Raises `BrokenImage`."""
    for start, read in _FORMATS.items():
        if content.startswith(start):
            try:
                width, height = read(content)
            except (struct.error, IndexError, ValueError) as error:
                raise BrokenImage from error
            if width <= 0 or height <= 0:
                raise BrokenImage
            return width, height
    return None


def _png(content: bytes) -> Size:
    kind, width, height = struct.unpack_from(">4sII", content, 12)
    if kind != b"IHDR":
        raise BrokenImage
    return width, height


def _jpeg(content: bytes) -> Size:
    """Return the largest size of all frames that are announced: decoders use the last."""
    width = height = 0
    offset = 2
    for _ in range(_MAX_STEPS):
        offset = content.index(b"\xff", offset)  # decoders skip bytes before a marker as well
        marker = content[offset + 1]
        if marker == _JPEG_SCAN:
            return width, height
        if marker == _JPEG_FILLING:
            offset += 1
        elif marker in _JPEG_WITHOUT_LENGTH:
            offset += 2
        else:
            (length,) = struct.unpack_from(">H", content, offset + 2)
            if marker in _JPEG_FRAMES:
                frame_height, frame_width = struct.unpack_from(">HH", content, offset + 5)
                width, height = max(width, frame_width), max(height, frame_height)
            offset += 2 + length
    raise BrokenImage


def _gif(content: bytes) -> Size:
    """Return the size of the screen, or of the first image if larger: decoders then enlarge the screen."""
    width, height, flags = struct.unpack_from("<HHB", content, 6)
    offset = 13 + (3 << (flags & 7) + 1 if flags & _GIF_HAS_PALETTE else 0)
    is_extension = False
    for _ in range(_MAX_STEPS):
        byte = content[offset]
        if is_extension:  # a chain of blocks up to an empty one
            offset += 1 + byte
            is_extension = byte != 0
        elif byte == _GIF_IMAGE:
            left, top, image_width, image_height = struct.unpack_from("<HHHH", content, offset + 1)
            return max(width, left + image_width), max(height, top + image_height)
        elif byte == _GIF_EXTENSION:
            offset += 2
            is_extension = True
        else:
            break
    raise BrokenImage


def _webp(content: bytes) -> Size:
    kind = content[12:16]
    if content[8:12] != b"WEBP":
        raise BrokenImage
    if kind == b"VP8X":
        width, height = (int.from_bytes(content[offset : offset + 3], "little") + 1 for offset in (24, 27))
        return (width, height) if len(content) >= 30 else (0, 0)  # noqa: PLR2004 - where the header ends
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", content, 21)[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", content, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise BrokenImage


def _bmp(content: bytes) -> Size:
    (header,) = struct.unpack_from("<I", content, 14)
    width, height = struct.unpack_from("<HH" if header == _OLD_BMP_HEADER else "<ii", content, 18)
    return width, abs(height)  # a negative height: the rows run downwards


_FORMATS: Mapping[bytes, Callable[[bytes], Size]] = MappingProxyType(
    {
        b"\x89PNG\r\n\x1a\n": _png,
        b"\xff\xd8\xff": _jpeg,
        b"GIF87a": _gif,
        b"GIF89a": _gif,
        b"RIFF": _webp,
        b"BM": _bmp,
    }
)

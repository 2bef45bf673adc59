"""Width and height of a picture from its first bytes, without decoding it. Pure; `media.py` calls it.

A few bytes can claim to be gigabytes of pixels, which the engine would make room for before it finds out. What is
read here is what decoders (Pillow, libjpeg, libwebp, stb_image) take the size from.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from types import MappingProxyType

Size = tuple[int, int]

#: JPEG markers that a frame header, with the size, follows; the gaps are tables (DHT, JPG, DAC).
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_SCAN, _JPEG_FILLING = 0xDA, 0xFF
_JPEG_ALONE = frozenset({0x00, 0x01, *range(0xD0, 0xD9)})
_GIF_EXTENSION, _GIF_IMAGE = 0x21, 0x2C
_GIF_HAS_PALETTE = 0x80
_OLD_BMP_HEADER = 12
#: No real header has so many parts; a made-up one must not keep the gateway busy.
_MOST_STEPS = 5000


class BrokenImage(Exception):
    """The header cannot be read or has no size."""


def read_size(content: bytes) -> Size | None:
    """None: not a PNG, JPEG, GIF, WebP or BMP. Raises `BrokenImage`."""
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
    """The largest of all frames that are announced: of several, decoders take the last."""
    width = height = 0
    place = 2
    for _ in range(_MOST_STEPS):
        place = content.index(b"\xff", place)  # what is not a marker is skipped, as decoders do
        marker = content[place + 1]
        if marker == _JPEG_SCAN:
            return width, height
        if marker == _JPEG_FILLING:
            place += 1
        elif marker in _JPEG_ALONE:
            place += 2
        else:
            (length,) = struct.unpack_from(">H", content, place + 2)
            if marker in _JPEG_FRAMES:
                frame_height, frame_width = struct.unpack_from(">HH", content, place + 5)
                width, height = max(width, frame_width), max(height, frame_height)
            place += 2 + length
    raise BrokenImage


def _gif(content: bytes) -> Size:
    """The screen, or the first image where that is larger: then decoders enlarge the screen."""
    width, height, flags = struct.unpack_from("<HHB", content, 6)
    place = 13 + (3 << (flags & 7) + 1 if flags & _GIF_HAS_PALETTE else 0)
    is_extension = False
    for _ in range(_MOST_STEPS):
        byte = content[place]
        if is_extension:  # a chain of blocks; an empty one ends it
            place += 1 + byte
            is_extension = byte != 0
        elif byte == _GIF_IMAGE:
            left, top, image_width, image_height = struct.unpack_from("<HHHH", content, place + 1)
            return max(width, left + image_width), max(height, top + image_height)
        elif byte == _GIF_EXTENSION:
            place += 2
            is_extension = True
        else:
            break
    raise BrokenImage


def _webp(content: bytes) -> Size:
    kind = content[12:16]
    if content[8:12] != b"WEBP":
        raise BrokenImage
    if kind == b"VP8X":
        width, height = (int.from_bytes(content[place : place + 3], "little") + 1 for place in (24, 27))
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

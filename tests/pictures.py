"""Pictures for tests, made without an imaging library, and the data URLs that carry them."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: One figure each, named after what it shows, in every format; `scripts/train_tiny_vlm.py --pictures` writes them.
SAMPLES = Path(__file__).parent / "fixtures" / "pictures"
COLOURS = {"red": b"\xff\x00\x00", "green": b"\x00\xa0\x20", "blue": b"\x00\x00\xff", "yellow": b"\xff\xe0\x00"}
WHITE = b"\xff\xff\xff"


def png(width: int = 2, height: int = 2, colour: bytes = COLOURS["red"]) -> bytes:
    """Return a PNG of one colour."""
    return _png(width, height, (b"\x00" + colour * width) * height)


def png_of_stated_size(width: int, height: int) -> bytes:
    """Return a small PNG whose header states another size."""
    whole = png()
    return whole[:16] + struct.pack(">II", width, height) + whole[24:]


def figure(name: str, side: int = 120) -> bytes:
    """Return a PNG of a figure such as `red circle` on white."""
    colour, shape = name.split()
    centre, radius = side * 0.45, side * 0.3
    inside = _INSIDE[shape]
    rows = [
        b"".join(
            COLOURS[colour] if inside((x - centre) / radius, (y - centre) / radius) else WHITE for x in range(side)
        )
        for y in range(side)
    ]
    return _png(side, side, b"".join(b"\x00" + row for row in rows))


def data_url(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64," + base64.b64encode(content).decode()


def image_part(content: bytes, kind: str = "png", **more: Any) -> dict[str, Any]:
    """Return a picture as a part of a chat message."""
    return {"type": "image_url", "image_url": {"url": data_url(content, kind), **more}}


_INSIDE: dict[str, Callable[[float, float], bool]] = {
    "circle": lambda x, y: x * x + y * y <= 1,
    "square": lambda x, y: max(abs(x), abs(y)) <= 1,
    "triangle": lambda x, y: abs(x) * 2 - 1 <= y <= 1,
}


def _png(width: int, height: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

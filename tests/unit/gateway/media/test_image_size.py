"""Sizes from headers: what real encoders write, what is cut off, and what was made up to mislead."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_api_server.gateway.media.image_size import BrokenImage, read_size
from tests.pictures import SAMPLES, png, png_of_stated_size

STARTS = [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"RIFF0000WEBPVP8X", b"RIFF0000WEBPVP8L",
          b"RIFF0000WEBPVP8 ", b"BM"]  # fmt: skip
SOS = b"\xff\xda\x00\x08"


def segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def frame(width: int, height: int, marker: int = 0xC0) -> bytes:
    return segment(marker, struct.pack(">BHHB", 8, height, width, 3) + bytes(9))


def gif(screen: tuple[int, int], image: tuple[int, int, int, int], *, palette: int = 0, before: bytes = b"") -> bytes:
    flags = 0x80 | palette - 1 if palette else 0
    head = b"GIF89a" + struct.pack("<HHBBB", *screen, flags, 0, 0) + bytes(3 << palette if palette else 0)
    return head + before + b"\x2c" + struct.pack("<HHHHB", *image, 0)


@pytest.mark.parametrize("sample", sorted(SAMPLES.iterdir()), ids=lambda path: path.name)
def test_sizes_of_real_files(sample: Path) -> None:
    """The name of each ends with its size: red-circle-96x80.jpg."""
    width, _, height = sample.stem.rpartition("-")[2].partition("x")
    assert read_size(sample.read_bytes()) == (int(width), int(height))


def test_every_format_is_among_the_samples() -> None:
    assert {sample.suffix for sample in SAMPLES.iterdir()} == {".png", ".jpg", ".gif", ".webp", ".bmp"}


@pytest.mark.parametrize(
    ("content", "size"),
    [
        (png_of_stated_size(10_000, 10_000)[:64], (10_000, 10_000)),
        (b"\xff\xd8" + segment(0xE1, frame(9, 9)) + frame(640, 480) + SOS, (640, 480)),  # a thumbnail inside Exif
        (b"\xff\xd8" + frame(640, 480, 0xC2) + SOS, (640, 480)),  # progressive
        (b"\xff\xd8" + segment(0xC4, b"tables") + b"\xff\xff" + frame(640, 480) + SOS, (640, 480)),
        (b"\xff\xd8" + frame(8, 8) + b"junk" + frame(9000, 9000) + SOS, (9000, 9000)),  # Pillow takes the last
        (b"\xff\xd8" + frame(9000, 9000) + frame(8, 8) + SOS, (9000, 9000)),
        (gif((7, 5), (0, 0, 7, 5)), (7, 5)),
        (gif((7, 5), (0, 0, 7, 5), palette=8, before=b"\x21\xfe\x03abc\x02de\x00\x21\xf9\x01x\x00"), (7, 5)),
        (gif((1, 1), (10, 20, 30_000, 40_000)), (30_010, 40_020)),  # Pillow enlarges the screen
        (b"BM" + bytes(12) + struct.pack("<Ihh", 12, 30, 20), (30, 20)),
        (b"BM" + bytes(12) + struct.pack("<Iii", 40, 30, -20), (30, 20)),
        (b"RIFF0000WEBPVP8X" + bytes(8) + b"\xff\xff\x00\x0f\x00\x00", (65_536, 16)),
    ],
)  # fmt: skip
def test_sizes_of_headers(content: bytes, size: tuple[int, int]) -> None:
    assert read_size(content) == size


@pytest.mark.parametrize(
    "content",
    [
        png(0, 5),
        b"\xff\xd8\xff\xd9",
        b"\xff\xd8" + SOS,
        b"\xff\xd8" + frame(0, 4) + SOS,
        b"\xff\xd8" + frame(4, 4),
        b"GIF89a" + bytes(7) + b"\x3b",
        b"BM" + bytes(12) + struct.pack("<Iii", 40, -3, 4),
        b"RIFF0000WAVEfmt " + bytes(30),
        b"RIFF0000WEBPEXIF" + bytes(30),
    ],
)
def test_headers_without_a_size_are_broken(content: bytes) -> None:
    with pytest.raises(BrokenImage):
        read_size(content)


@pytest.mark.parametrize("content", [b"", b"\x89PN", b"GIF90a", b"<svg/>", b"II*\x00", b"text"])
def test_other_formats_have_no_size(content: bytes) -> None:
    assert read_size(content) is None


@given(start=st.sampled_from(STARTS), rest=st.binary(max_size=200))
def test_any_bytes_have_a_positive_size_or_are_broken(start: bytes, rest: bytes) -> None:
    try:
        size = read_size(start + rest)
    except BrokenImage:
        return
    assert size is not None
    assert min(size) > 0


@pytest.mark.parametrize(
    ("start", "part", "end"),
    [
        (b"\xff\xd8\xff", b"\xff\x01", frame(4, 4) + SOS),
        (b"\xff\xd8\xff", b"\xff", frame(4, 4) + SOS),
        (b"GIF89a" + bytes(7), b"\x21\x00\x01a\x00", gif((4, 4), (0, 0, 4, 4))[13:]),
        (b"GIF89a" + bytes(7) + b"\x21\x00", b"\x01a", b"\x00" + gif((4, 4), (0, 0, 4, 4))[13:]),
    ],
)
def test_endless_headers_are_broken(start: bytes, part: bytes, end: bytes) -> None:
    assert read_size(start + part * 100 + end) == (4, 4)
    with pytest.raises(BrokenImage):
        read_size(start + part * 10_000 + end)

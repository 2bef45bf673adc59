"""Headers of GGUF files, versions 2 and 3: facts about the model, and whether the file is complete.

Tensors are never read. Every count and length is checked against the size of the file before use, because files are
not trusted. Format: github.com/ggml-org/ggml, docs/gguf.md. Blocking: runs in a thread.
"""

from __future__ import annotations

import contextlib
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_api_server.engines.base import ModelProblem

_MAGIC = b"GGUF"
_FIRST_READ = 4 * 1024 * 1024
_MAX_HEADER_BYTES = 1024 * 1024 * 1024
_MAX_ENTRIES = 1_000_000
_MAX_DIMENSIONS = 4
_MAX_KEPT_VALUES = 4096
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

#: ggml types: number -> (values per block, bytes per block). Unlisted, newer types are not checked.
_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82),
    23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2),
    34: (256, 54), 35: (256, 66), 39: (32, 17),
}  # fmt: skip

_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


class _IncompleteData(Exception):
    """The bytes read so far end within the header."""


@dataclass(frozen=True)
class Array:
    """Array of the metadata. `values` is kept for short arrays of numbers only."""

    count: int
    values: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Header:
    """Metadata of one file. `data_end` is the end of its last tensor, the minimum size of a complete file."""

    metadata: dict[str, Any]
    data_end: int


@dataclass(frozen=True)
class GGUFFacts:
    """Facts about one model. `file_bytes` is the sum over its parts; 0 or None: unknown."""

    architecture: str
    file_bytes: int
    context_length: int | None
    block_count: int
    kv_values_per_token: int
    vocabulary: int
    has_chat_template: bool
    pooling_type: int | None
    has_vision_encoder: bool


def read_facts(path: Path) -> GGUFFacts:
    """Read a model's file, or all parts of a split one given its first. Raises `ModelProblem`."""
    header, size = read_header(path)
    for part in _other_parts(path):
        size += read_header(part)[1]
    return _facts(header.metadata, size)


def read_header(path: Path) -> tuple[Header, int]:
    """Return the header and size of one file. Raises `ModelProblem` if it is missing, no GGUF file or truncated."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            header = _parse_growing(file, size)
    except FileNotFoundError:
        raise ModelProblem("the model's path does not exist; check models.available.NAME.path") from None
    except IsADirectoryError:
        raise ModelProblem("the model's path is a folder; llama.cpp needs the .gguf file in it") from None
    except OSError as error:
        raise ModelProblem(f"the model's file cannot be read: {error.strerror}") from None
    if size < header.data_end:
        raise ModelProblem(f"the file is cut off: {size} of {header.data_end} bytes; fetch it again")
    return header, size


def _parse_growing(file: Any, size: int) -> Header:
    """Parse the header, reading more of the file until it is complete."""
    if size == 0:
        raise ModelProblem("the file is empty")
    length = min(_FIRST_READ, size)
    while True:
        # Mapped memory returns to the system at once; the heap would keep some megabytes.
        with mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE) as data:
            file.seek(0)
            file.readinto(data)
            if data[:4] != _MAGIC:
                raise ModelProblem("not a GGUF file")
            with contextlib.suppress(_IncompleteData):
                return _Parser(data, size).parse()
        if length >= size:
            raise ModelProblem(f"the file is cut off within its header, after {size} bytes")
        if length >= _MAX_HEADER_BYTES:
            raise ModelProblem("not a GGUF file: its header is absurdly long")
        length = min(2 * length, size)


class _Parser:
    def __init__(self, data: mmap.mmap, file_size: int) -> None:
        self._data = data
        self._size = file_size
        self._offset = len(_MAGIC)

    def parse(self) -> Header:
        version = self._take("I")
        if version not in {2, 3}:
            kind = "of another byte order" if version & 0xFFFF == 0 else f"of version {version}"
            raise ModelProblem(f"GGUF files {kind} are not supported")
        tensors, entries = self._count(self._take("Q")), self._count(self._take("Q"))
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._string()
            metadata[key] = self._value(self._take("I"))
        end = max((self._tensor_end() for _ in range(tensors)), default=0)
        alignment = _positive(metadata.get("general.alignment")) or 32
        start = -(-self._offset // alignment) * alignment
        return Header(metadata, start + end if end else self._offset)

    def _take(self, code: str) -> Any:
        length = struct.calcsize("<" + code)
        if self._offset + length > len(self._data):
            raise _IncompleteData
        (value,) = struct.unpack_from("<" + code, self._data, self._offset)
        self._offset += length
        return value

    def _count(self, count: int) -> int:
        if count > _MAX_ENTRIES:
            raise ModelProblem(f"not a usable GGUF file: its header claims {count} entries")
        return count

    def _skip(self, length: int) -> None:
        if self._offset + length > self._size:
            # A flipped bit in a length looks the same as a truncated file.
            raise ModelProblem(f"the file is cut off or damaged: its header reaches past its {self._size} bytes")
        self._offset += length
        if self._offset > len(self._data):
            raise _IncompleteData

    def _string(self) -> str:
        length = self._take("Q")
        self._skip(length)
        return self._data[self._offset - length : self._offset].decode("utf-8", "replace")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(self._take("I"), self._take("Q"))
        if kind not in _SCALARS:
            raise ModelProblem(f"not a usable GGUF file: unknown type {kind} in its header")
        return self._take(_SCALARS[kind])

    def _array(self, kind: int, count: int) -> Array:
        if kind == _STRING:
            self._skip_strings(count)
            return Array(count)
        if kind not in _SCALARS:
            raise ModelProblem(f"not a usable GGUF file: arrays of type {kind} in its header")
        length = count * struct.calcsize("<" + _SCALARS[kind])
        self._skip(length)
        if count > _MAX_KEPT_VALUES:
            return Array(count)
        return Array(count, struct.unpack_from(f"<{count}{_SCALARS[kind]}", self._data, self._offset - length))

    def _skip_strings(self, count: int) -> None:
        # Vocabularies have 250,000 entries, so the loop uses locals and few calls.
        unpack, data, at, last = struct.Struct("<Q").unpack_from, self._data, self._offset, len(self._data) - 8
        for _ in range(count):
            if at > last:
                break
            at += 8 + unpack(data, at)[0]
        else:
            last = at  # all strings are complete
        self._skip(at - self._offset)
        if at > last:
            raise _IncompleteData

    def _tensor_end(self) -> int:
        self._string()
        dimensions = self._take("I")
        if dimensions > _MAX_DIMENSIONS:
            raise ModelProblem(f"not a usable GGUF file: a tensor of {dimensions} dimensions")
        values = 1
        for _ in range(dimensions):
            values *= self._take("Q")
        kind, offset = self._take("I"), self._take("Q")
        per_block, block_bytes = _BLOCKS.get(kind, (1, 0))
        return int(offset + values // per_block * block_bytes)


def _other_parts(path: Path) -> list[Path]:
    match = _PART.search(path.name)
    if match is None:
        return []
    number, count = int(match[1]), int(match[2])
    if number != 1:
        raise ModelProblem(f"this is part {number} of {count}; the path must name the first")
    stem = path.name[: match.start()]
    parts = [path.with_name(f"{stem}-{i:05d}-of-{count:05d}.gguf") for i in range(2, count + 1)]
    for i, part in enumerate(parts, start=2):
        if not part.exists():
            raise ModelProblem(f"part {i} of {count} of the model's file is missing")
    return parts


def _facts(metadata: dict[str, Any], size: int) -> GGUFFacts:
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise ModelProblem("not a usable GGUF file: it does not name its architecture")

    def field(name: str) -> Any:
        return metadata.get(f"{architecture}.{name}")

    tokens = metadata.get("tokenizer.ggml.tokens")
    pooling = field("pooling_type")
    return GGUFFacts(
        architecture=architecture,
        file_bytes=size,
        context_length=_positive(field("context_length")),
        block_count=_positive(field("block_count")) or 0,
        kv_values_per_token=_kv_values_per_token(field),
        vocabulary=tokens.count if isinstance(tokens, Array) else 0,
        has_chat_template="tokenizer.chat_template" in metadata,
        pooling_type=pooling if isinstance(pooling, int) else None,
        has_vision_encoder=bool(metadata.get("clip.has_vision_encoder")),
    )


def _kv_values_per_token(field: Any) -> int:
    """Return how many numbers a token adds to the cache over all layers; an upper bound with sliding windows."""
    layers = _positive(field("block_count")) or 0
    heads = _positive(field("attention.head_count")) or 1
    kv_heads = field("attention.head_count_kv")
    if isinstance(kv_heads, Array):
        total_heads = sum(h for h in kv_heads.values or () if isinstance(h, int))
    else:
        total_heads = layers * (kv_heads if isinstance(kv_heads, int) else heads)
    default_length = (_positive(field("embedding_length")) or 0) // heads
    key = _positive(field("attention.key_length")) or default_length
    value = _positive(field("attention.value_length")) or default_length
    return total_heads * (key + value)


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None

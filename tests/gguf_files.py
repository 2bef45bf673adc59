"""Small GGUF files for tests: a header with real structure and as many bytes of tensors as it states."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

F32 = 0
LLAMA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.context_length": 4096,
    "llama.block_count": 2,
    "llama.embedding_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "tokenizer.ggml.tokens": ["<s>", "</s>", "hello"],
    "tokenizer.chat_template": "{{ messages }}",
}


def write_gguf(
    path: Path, metadata: dict[str, Any] | None = None, *, tensors: tuple[int, ...] = (64, 32), version: int = 3
) -> Path:
    """Write a GGUF file; `tensors` has the number of float32 values of each."""
    entries = LLAMA if metadata is None else metadata
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(entries))
    header += b"".join(_string(key) + _value(value) for key, value in entries.items())
    offset = 0
    for number, values in enumerate(tensors):
        header += _string(f"t{number}") + struct.pack("<IQIQ", 1, values, F32, offset)
        offset += -(-values * 4 // 32) * 32
    header += bytes(-len(header) % 32)
    path.write_bytes(header + bytes(offset))
    return path


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Any) -> bytes:
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case str():
            return struct.pack("<I", 8) + _string(value)
        case [str(), *_]:
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
        case list():
            return struct.pack("<IIQ", 9, 4, len(value)) + struct.pack(f"<{len(value)}I", *value)
    raise TypeError(value)

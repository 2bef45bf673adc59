"""Modes: a request, the number of connections that send it, and the figures computed from the results."""

from __future__ import annotations

import base64
import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.speed.contenders import KEY, Running
from bench.speed.processes import LOAD_CORE, Usage, native

Figures = dict[str, float]
WARMUP = 1.0


@dataclass(frozen=True)
class Mode:
    """Settings of a measurement.

    `pace_us`: microseconds between two chunks of a stream; 0: full speed, or no stream. `skip`: contenders left out.
    """

    name: str
    what: str
    connections: int
    body: Callable[[], dict[str, Any]]
    path: str = "/v1/chat/completions"
    pace_us: int = 0
    chunks: int = 0
    warmup: float = WARMUP
    skip: frozenset[str] = frozenset()

    @property
    def spread_us(self) -> int:
        """Microseconds within which the connections start: a stream and one pace, so that chunks spread as well."""
        return self.pace_us * (self.chunks + 1)


def _chat(**more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"model": "bench", "messages": [{"role": "user", "content": "Hello there!"}], **more}


def _stream(chunks: int, pace_us: int = 0) -> Callable[[], dict[str, Any]]:
    return _chat(stream=True, max_tokens=chunks, seed=pace_us)


def _long_prompt() -> dict[str, Any]:
    return {"model": "bench", "messages": [{"role": "user", "content": "All work and no play. " * 47_000}]}


def _embeddings() -> dict[str, Any]:
    return {
        "model": "bench",
        "input": [f"a text to embed {number}" for number in range(2000)],
        "encoding_format": "base64",
    }


def _picture() -> dict[str, Any]:
    """Return 8 MB of JSON with one image of few pixels: the header of a bitmap and a long rest."""
    bitmap = (
        b"BM" + (6_000_000).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little") + (40).to_bytes(4, "little")
    )
    bitmap += (1000).to_bytes(4, "little") + (1500).to_bytes(4, "little") + b"\1\0\x20\0" + bytes(24)
    url = "data:image/bmp;base64," + base64.b64encode(bitmap.ljust(6_000_000, b"\0")).decode()
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": url}}]
    return {"model": "bench", "messages": [{"role": "user", "content": parts}]}


_PACE_US = 20_000
_SLOW = frozenset({"litellm"})
MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("plain-1", "plain requests, 1 connection", 1, _chat()),
        Mode("plain-64", "plain requests, 64 connections", 64, _chat()),
        Mode("streams", "32 streams of 64 chunks at full speed", 32, _stream(64), chunks=64),
        Mode(
            "paced-200", "200 streams, 50 chunks/s each", 200, _stream(100, _PACE_US), pace_us=_PACE_US, chunks=100,
            warmup=2.5,
        ),
        Mode(
            "paced-1000", "1,000 streams, 50 chunks/s each", 1000, _stream(100, _PACE_US), pace_us=_PACE_US, chunks=100,
            warmup=4, skip=_SLOW,
        ),
        Mode("prompts", "prompts of 1 MB, 8 connections", 8, _long_prompt),
        Mode("embeddings", "2,000 inputs to embed, 4 connections", 4, _embeddings, path="/v1/embeddings"),
        Mode("pictures", "bodies of 8 MB with a picture, 2 connections", 2, _picture),
    )
}  # fmt: skip


def write_request(mode: Mode, folder: Path, key: str = KEY) -> Path:
    """Return the request as bytes for the load generator."""
    body = json.dumps(mode.body()).encode()
    head = (
        f"POST {mode.path} HTTP/1.1\r\nhost: 127.0.0.1\r\nuser-agent: bench\r\naccept: */*\r\n"
        f"content-type: application/json\r\nauthorization: Bearer {key}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    path = folder / f"{mode.name}-{key[-6:]}.request"
    path.write_bytes(head.encode() + body)
    return path


def run(mode: Mode, target: Running, folder: Path, seconds: float, keys: list[str] | None = None) -> Figures:
    """Run one measurement."""
    requests = [write_request(mode, folder, key) for key in keys or [KEY]]
    argv = ["taskset", "-c", str(LOAD_CORE), str(native("load")), str(target.port), str(mode.connections)]
    argv += [str(seconds), str(mode.warmup), str(mode.spread_us), *map(str, requests)]
    processes = target.processes()
    load = subprocess.Popen(argv, stdout=subprocess.PIPE)
    time.sleep(mode.warmup)
    before = Usage.of(processes)
    begin = time.monotonic()
    # Memory is read under load, shortly before the end.
    time.sleep(max(0.0, seconds - 0.3))
    after = Usage.of(processes)
    window = time.monotonic() - begin
    output, _ = load.communicate(timeout=seconds + 60)
    if load.returncode:
        raise RuntimeError(f"the load generator ended with {load.returncode}")
    found = figures(mode, json.loads(output))
    if target.pid is not None:
        workers = {process.pid for process in processes if process.is_running() and target.is_worker(process)}
        cpu = {pid: used / window for pid, used in after.since(before).items()}
        found |= costs(found, cpu, after.memory, workers)
    return found


def figures(mode: Mode, seen: dict[str, float]) -> Figures:
    """Return the figures of the load generator's results."""
    rate = seen["requests"] / seen["seconds"]
    found: Figures = {
        "requests_per_s": rate,
        "errors": seen["errors"],
        "latency_p50_ms": seen["latency_p50_us"] / 1000,
        "latency_p99_ms": seen["latency_p99_us"] / 1000,
    }
    if mode.chunks:
        found["chunks_per_s"] = seen["chunks"] / seen["seconds"]
    if mode.pace_us:
        found |= {
            "first_chunk_p50_ms": seen["first_p50_us"] / 1000,
            "first_chunk_p99_ms": seen["first_p99_us"] / 1000,
            "transit_p50_ms": seen["transit_p50_us"] / 1000,
            "transit_p99_ms": seen["transit_p99_us"] / 1000,
            "jitter_p99_ms": seen["jitter_p99_us"] / 1000,
        }
    return found


def costs(seen: Figures, cpu: dict[int, float], memory: dict[int, int], workers: set[int]) -> Figures:
    """Return the figures of the processes: `cpu` in seconds per second, of all and of the `workers` alone."""
    found = {
        "memory_mb": sum(memory.values()) / 1e6,
        "worker_memory_mb": sum(size for pid, size in memory.items() if pid in workers) / 1e6,
        "cpu_percent": 100 * sum(cpu.values()),
    }
    rate, what = (seen["chunks_per_s"], "chunk") if "transit_p50_ms" in seen else (seen["requests_per_s"], "request")
    if rate:
        found[f"cpu_us_per_{what}"] = sum(cpu.values()) / rate * 1e6
        found[f"worker_cpu_us_per_{what}"] = sum(used for pid, used in cpu.items() if pid in workers) / rate * 1e6
    return found

"""Tokens per second and time to the first token on real engines, directly and through the server.

`make bench-engines`: llama.cpp, and vLLM where `make vllm` has installed it. The same client, by unix socket to the
engine and by TCP to the server, in turns; at 1, 8 and 32 streams. The last line is one JSON object; ratios are
of medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bench.idle import free_port

KEY = "sk-only-for-this-measurement"
MODEL = "bench"
STREAMS = (1, 8, 32)
START_TIMEOUT = 300.0
ROOT = Path(__file__).parent.parent
_LONG = "Tell a long story about the sea. "


@dataclass(frozen=True)
class Door:
    """Address of a server: the path of a unix socket, or a port."""

    socket: Path | None = None
    port: int = 0


@dataclass(frozen=True)
class Seen:
    """Figures of concurrent streams: tokens per second together, milliseconds to the first token of each."""

    rate: float
    first: list[float]


async def stream(door: Door, tokens: int, number: int) -> tuple[float, int]:
    """Run one streamed chat; return the seconds to its first token and the number of tokens."""
    body = json.dumps(
        {
            "model": MODEL,
            "stream": True,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "messages": [{"role": "user", "content": f"{number}. {_LONG}"}],
        }
    ).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\nconnection: close\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer {KEY}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    began = time.perf_counter()
    if door.socket is not None:
        reader, writer = await asyncio.open_unix_connection(str(door.socket))
    else:
        reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
    writer.write(head.encode() + body)
    first, count = 0.0, 0
    async for line in reader:
        if line.startswith(b"data: {") and (b'"content":"' in line or b'"content": "' in line):
            first = first or time.perf_counter() - began
            count += 1
        elif line.startswith(b"data: [DONE]"):
            break
    writer.close()
    if not count:
        raise RuntimeError("a stream without a token")
    return first, count


async def crowd(door: Door, streams: int, tokens: int) -> Seen:
    began = time.perf_counter()
    seen = await asyncio.gather(*(stream(door, tokens, number) for number in range(streams)))
    seconds = time.perf_counter() - began
    return Seen(sum(count for _, count in seen) / seconds, [first * 1000 for first, _ in seen])


@contextmanager
def serving(model: dict[str, Any], engines: dict[str, Any]) -> Iterator[tuple[Door, Door]]:
    """Start the server with one model loaded; yield the engine's address and the server's."""
    with tempfile.TemporaryDirectory(prefix="engines-") as name:
        folder, port = Path(name), free_port()
        config = {
            "server": {"host": "127.0.0.1", "port": port, "run_dir": str(folder / "run")},
            "auth": {"api_keys": [{"key": KEY, "name": "bench", "requests_per_minute": 10**6, "max_concurrent": 1000}]},
            "logging": {"path": str(folder / "logs"), "console": False},
            "storage": {"url": f"sqlite:///{folder / 'bench.db'}"},
            "inference": {"max_batch_size": max(STREAMS)},
            "engines": engines,
            "models": {"default": MODEL, "available": {MODEL: model}},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        command = [str(Path(sys.executable).with_name("llm-api-server")), "serve", "--config", "config.yaml"]
        server = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            _load(port)
            (socket,) = (folder / "run" / "engines").glob("*.sock")
            yield Door(socket), Door(port=port)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


def _load(port: int) -> None:
    """Wait until the server completes a request to the model."""
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}).encode()
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        try:
            request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", body, headers)
            with urllib.request.urlopen(request, timeout=START_TIMEOUT):  # noqa: S310 - a fixed scheme
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


async def measure(doors: dict[str, Door], tokens: int, rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for streams in STREAMS:
        seen: dict[str, list[Seen]] = {name: [] for name in doors}
        for number in range(rounds + 1):
            for name in doors if number % 2 else reversed(doors):
                one = await crowd(doors[name], streams, tokens)
                if number:  # the first round warms up
                    seen[name].append(one)
        rates = {name: statistics.median(one.rate for one in some) for name, some in seen.items()}
        first = {name: statistics.median(time for one in some for time in one.first) for name, some in seen.items()}
        found[str(streams)] = {
            "tokens_per_s": {**_rounded(rates), "ratio": round(rates["server"] / rates["engine"], 3)},
            "first_token_ms": {**_rounded(first), "added": round(first["server"] - first["engine"], 2)},
        }
        print(f"{streams:3} streams: {json.dumps(found[str(streams)])}", flush=True)
    return found


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    models, vllm = ROOT / ".cache" / "test-models", ROOT / ".venv-vllm" / "bin" / "python"
    parser.add_argument("--gguf", type=Path, default=models / "SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--folder", type=Path, default=models / "SmolLM2-135M-Instruct")
    parser.add_argument("--vllm-python", type=Path, default=vllm)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    cases: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "llama_cpp": ({"path": str(arguments.gguf), "max_tokens": 512}, {})
    }
    if arguments.vllm_python.exists() and arguments.folder.exists():
        model = {"path": str(arguments.folder), "engine": "vllm", "max_tokens": 512}
        cases["vllm"] = (model, {"vllm": {"python": str(arguments.vllm_python)}})
    results: dict[str, Any] = {}
    for name, (model, engines) in cases.items():
        print(f"{name}:", flush=True)
        with serving(model, engines) as (engine, server):
            doors = {"engine": engine, "server": server}
            results[name] = asyncio.run(measure(doors, arguments.tokens, arguments.rounds))
    print(json.dumps({"bench": "engines", "rounds": arguments.rounds, "tokens": arguments.tokens, **results}))


if __name__ == "__main__":
    main()

"""Measures an idle server, nothing loaded: seconds from exec to `/readyz` 200, and the memory of all its processes.

`make bench-idle` runs it. The last line is one JSON object. Memory is the proportional set size (PSS: shared pages
counted once); RSS, which counts them per process, is shown beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import psutil

START_TIMEOUT = 60.0
POLL_INTERVAL = 0.01
#: Seconds after readiness before memory is read, so that start-up work has settled.
SETTLE_INTERVAL = 2.0

CONFIG = """\
server: {{host: 127.0.0.1, port: {port}, workers: {workers}, run_dir: {folder}/run}}
auth: {{enabled: true, api_keys: [{{key: sk-only-for-this-measurement, name: bench}}]}}
logging: {{path: {folder}/logs, console: false}}
models:
  available:
    never-loaded: {{path: {folder}/never-loaded.gguf}}
"""


@dataclass(frozen=True)
class Process:
    """One process of the server; memory in bytes."""

    name: str
    pss: int
    rss: int


@dataclass(frozen=True)
class Round:
    """Figures of one start of the server."""

    start_seconds: float
    processes: list[Process]


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measure(workers: int) -> Round:
    """Start the server in a folder of its own, measure it, stop it, and check that nothing is left of it."""
    with tempfile.TemporaryDirectory(prefix="idle-") as folder:
        port = free_port()
        config = Path(folder) / "config.yaml"
        config.write_text(CONFIG.format(port=port, workers=workers, folder=folder))
        before = _ours(folder)
        start = time.monotonic()
        server = _start(config)
        try:
            _wait_ready(server, port)
            start_seconds = time.monotonic() - start
            time.sleep(SETTLE_INTERVAL)
            processes = [_describe(process) for process in _ours(folder, server.pid) if process not in before]
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(30)
        if left := _ours(folder):
            raise RuntimeError(f"still running after SIGTERM: {left}")
    return Round(start_seconds, processes)


def _start(config: Path) -> subprocess.Popen[bytes]:
    command = [str(Path(sys.executable).with_name("llm-api-server")), "serve", "--config", str(config)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def _wait_ready(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {server.returncode}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1):
                return
        except OSError:  # refused, or 503: an HTTPError is an OSError
            time.sleep(POLL_INTERVAL)
    raise RuntimeError(f"not ready within {START_TIMEOUT:.0f} s")


def _ours(folder: str, root: int | None = None) -> list[psutil.Process]:
    """Return the tree of processes below `root`, and every process with this run's folder in its command line."""
    found = {process.pid: process for process in psutil.process_iter() if folder in " ".join(_command(process))}
    if root is not None:
        top = psutil.Process(root)
        found |= {process.pid: process for process in [top, *top.children(recursive=True)]}
    return [found[pid] for pid in sorted(found)]


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def _describe(process: psutil.Process) -> Process:
    memory = process.memory_full_info()
    return Process(" ".join(_command(process)[:4]), int(memory.pss), int(memory.rss))


def main() -> None:
    """Print a table and, as the last line, the medians as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    # The first start compiles bytecode and fills the page cache, so it is not counted.
    measure(arguments.workers)
    rounds = [measure(arguments.workers) for _ in range(arguments.rounds)]

    print(f"{'process':60} {'PSS MB':>8} {'RSS MB':>8}")
    for process in rounds[-1].processes:
        print(f"{process.name[-60:]:60} {process.pss / 1e6:8.1f} {process.rss / 1e6:8.1f}")
    print("start, s: " + "  ".join(f"{one.start_seconds:.2f}" for one in rounds))
    result = {
        "bench": "idle",
        "rounds": arguments.rounds,
        "workers": arguments.workers,
        "start_seconds_median": round(statistics.median(one.start_seconds for one in rounds), 3),
        "start_seconds_max": round(max(one.start_seconds for one in rounds), 3),
        "pss_mb_median": round(statistics.median(sum(p.pss for p in one.processes) for one in rounds) / 1e6, 1),
        "rss_mb_median": round(statistics.median(sum(p.rss for p in one.processes) for one in rounds) / 1e6, 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

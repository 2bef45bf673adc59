"""Two vLLM models swap in one slot many times: no request is lost, and nothing leaks."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.running import Server, running
from tests.waiting import wait_until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]

SWAPS = 30
#: Swaps until every cache has its final size.
WARM = 4
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, smollm2_folder: Path, vllm_python: Path) -> Iterator[Server]:
    model = {"path": str(smollm2_folder), "type": "llama", "max_tokens": 512}
    models = {"max_loaded": 1, "min_loaded_time": 0, "max_wait_time": 0, "available": {"a": model, "b": model}}
    config = {"server": {"timeout": 300}, "models": models, "engines": {"vllm": {"python": str(vllm_python)}}}
    with running(tmp_path_factory.mktemp("swaps"), config) as server:
        yield server


@dataclass(frozen=True)
class Figures:
    """Totals of all processes of the server with one model loaded. `ram` counts shared pages in proportion."""

    processes: int
    descriptors: int
    shared_memory: int
    sockets: int
    ram: int

    def __str__(self) -> str:
        return (
            f"{self.processes} processes, {self.descriptors} descriptors, {self.shared_memory} in shared memory, "
            f"{self.sockets} files in the run directory, {self.ram / MIB:.0f} MiB"
        )


def measure(server: Server) -> Figures:
    descriptors, ram, processes = 0, 0, server.processes()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            descriptors += process.num_fds()
            ram += process.memory_full_info().pss
    files = sum(1 for path in server.run_dir.rglob("*") if not path.is_dir())
    shared = sum(1 for path in Path("/dev/shm").iterdir())  # noqa: S108
    return Figures(len(processes), descriptors, shared, files, ram)


def stream(server: Server, model: str, started: threading.Event) -> int:
    """Return the tokens of a whole stream; set `started` at the first. vLLM may put several into one chunk."""
    body = {"model": model, "prompt": "Once", "max_tokens": 24, "stream": True, "ignore_eos": True, "logprobs": 1}
    lines = []
    with server.client(timeout=300) as client, client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: "):  # and not a comment while it waits
                started.set()
                lines.append(line)
    assert lines[-1] == "data: [DONE]", lines[-1]
    choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-1]]
    return sum(len(choice["logprobs"]["tokens"]) for choice in choices if choice["logprobs"])


def test_thirty_swaps_with_requests_in_flight_lose_and_leak_nothing(server: Server) -> None:
    figures: list[Figures] = []
    before: list[Future[int]] = []
    responses = 0
    with ThreadPoolExecutor(4) as pool:
        for number in range(SWAPS + 1):
            model = "ab"[number % 2]
            started = threading.Event()
            streams = [pool.submit(stream, server, model, started) for _ in range(2)]
            responses += sum(one.result() == 24 for one in before)
            assert started.wait(300)
            before = streams  # still in flight when the other model is requested
            figures.append(measure(server))
            print(f"swap {number:2} to {model}: {figures[-1]}", flush=True)
        responses += sum(one.result() == 24 for one in before)
    assert responses == 2 * (SWAPS + 1)
    wait_until(lambda: server.models()["ab"[SWAPS % 2]]["in_flight"] == 0)
    early, late = figures[WARM], figures[-1]
    print(f"from swap {WARM} to {SWAPS}: {early}  ->  {late}")
    assert late.processes <= early.processes
    assert late.shared_memory <= early.shared_memory
    assert late.sockets <= early.sockets
    assert late.descriptors <= early.descriptors + 8
    assert late.ram <= early.ram + 150 * MIB

"""Measures a cold load: seconds from the request to the first token of a model that is not loaded.

`make bench-coldload` runs it. Each round measures, in turn: vLLM's own server, this server starting the
same arguments by exec, and this server forking them from its zygote. The zygote starts before the first round, since a
server starts it once; its seconds are shown separately. The last line is one JSON object.
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from llm_api_server.config.load import load_config
from llm_api_server.config.models import Config
from llm_api_server.engines.select import engines_by_model

KEY = "sk-only-for-this-measurement"
MODEL = "cold"
TIMEOUT = 300.0
POLL_INTERVAL = 0.02

CONFIG = """\
server: {{host: 127.0.0.1, port: {port}, timeout: 300, run_dir: {folder}/run}}
auth: {{enabled: true, api_keys: [{{key: {key}, name: bench}}]}}
logging: {{path: {folder}/logs, console: false}}
models:
  default: {model}
  available:
    {model}: {{path: {path}, engine: vllm, max_tokens: 1024}}
inference: {{optimize_first_token: true}}
engines:
  vllm: {{python: {python}, zygote: {zygote}}}
"""


class Gateway:
    """The server, with or without the zygote."""

    def __init__(self, config: Config, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        headers = {"Authorization": f"Bearer {KEY}"}
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{config.server.port}", headers=headers, timeout=TIMEOUT)

    def measure(self) -> tuple[float, dict[str, float]]:
        """Return the seconds to the first token and the phases of the load; unload the model afterwards."""
        start = time.monotonic()
        first_token(self.client)
        seconds = time.monotonic() - start
        (status,) = self.client.get("/admin/api/models").raise_for_status().json()["data"]
        self.client.post(f"/admin/api/models/{MODEL}/unload").raise_for_status()
        return seconds, status["phases"]


@contextmanager
def gateway(folder: Path, config: Config) -> Iterator[Gateway]:
    command = [str(Path(sys.executable).with_name("llm-api-server")), "serve", "--config", str(config.source)]
    with (folder / "output.txt").open("wb") as output:
        process = subprocess.Popen(command, env=environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        server = Gateway(config, process)
        wait_healthy(server.client, "/readyz", process)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def configured(folder: Path, options: argparse.Namespace, *, zygote: bool) -> Config:
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    file = folder / "config.yaml"
    # The interpreter of a virtual environment is a symbolic link that must keep its path.
    paths = {"path": json.dumps(str(options.model.resolve())), "python": json.dumps(str(options.python.absolute()))}
    text = CONFIG.format(port=port, folder=folder, key=KEY, model=MODEL, zygote=json.dumps(zygote), **paths)
    file.write_text(text, encoding="utf-8")
    return load_config(file)


def measure_plain(config: Config, folder: Path) -> float:
    """vLLM's own server, with the arguments that this server would pass."""
    engine, entry = engines_by_model(config)[MODEL]
    path = folder / "plain.sock"
    path.unlink(missing_ok=True)
    plan = engine.plan(MODEL, entry, path)
    with (folder / "plain.log").open("wb") as log:
        start = time.monotonic()
        process = subprocess.Popen(
            plan.argv, env=environment() | plan.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=transport, base_url="http://engine", timeout=TIMEOUT) as client:
            wait_healthy(client, "/health", process)
            first_token(client)
        return time.monotonic() - start
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def first_token(client: httpx.Client) -> None:
    body: dict[str, Any] = {"model": MODEL, "prompt": "Hello", "max_tokens": 4, "stream": True, "temperature": 0}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith("data: "):
                choices = json.loads(line.removeprefix("data: "))["choices"]
                if choices and choices[0]["text"]:
                    return
    raise RuntimeError("the stream ended without a token")


def wait_healthy(client: httpx.Client, path: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {process.returncode}")
        try:
            if client.get(path).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(POLL_INTERVAL)
    raise RuntimeError(f"not ready within {TIMEOUT:.0f} s")


def environment() -> dict[str, str]:
    """Cache bytecode for all contenders in one folder."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for one in rounds for name in one)
    return {name: round(statistics.median(one.get(name, 0.0) for one in rounds), 2) for name in names}


def main() -> None:
    """Print every round, the phases, and, as the last line, the medians as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=int(os.environ.get("ROUNDS", "5")))
    parser.add_argument("--model", type=Path, default=Path(".cache/test-models/SmolLM2-135M-Instruct"))
    parser.add_argument("--python", type=Path, default=Path(".venv-vllm/bin/python"))
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {"plain": [], "exec": [], "forked": []}
    phases: dict[str, list[dict[str, float]]] = {"exec": [], "forked": []}
    with tempfile.TemporaryDirectory(prefix="coldload-") as name:
        folder = Path(name)
        by_exec = configured(folder / "exec", options, zygote=False)
        by_fork = configured(folder / "forked", options, zygote=True)
        with gateway(folder / "exec", by_exec) as execs, gateway(folder / "forked", by_fork) as forks:
            first, first_phases = forks.measure()  # starts the zygote and fills the caches of bytecode and files
            for number in range(1, options.rounds + 1):
                seconds["plain"].append(measure_plain(by_exec, folder))
                for kind, server in (("exec", execs), ("forked", forks)):
                    taken, parts = server.measure()
                    seconds[kind].append(taken)
                    phases[kind].append(parts)
                print(f"round {number}: " + "  ".join(f"{k} {v[-1]:.2f} s" for k, v in seconds.items()), flush=True)
    for kind, rounds in phases.items():
        print(f"phases {kind:7}" + "  ".join(f"{name} {value:.2f}" for name, value in medians(rounds).items()))
    print(
        f"first forked load, with the zygote's start: {first:.2f} s, of which process {first_phases['process']:.2f} s"
    )
    median = {kind: round(statistics.median(values), 3) for kind, values in seconds.items()}
    result = {
        "bench": "coldload",
        "rounds": options.rounds,
        "ratio_forked": round(median["plain"] / median["forked"], 2),
        "ratio_exec": round(median["plain"] / median["exec"], 2),
        **{f"{kind}_seconds_median": value for kind, value in median.items()},
        "phases_forked_seconds_median": medians(phases["forked"]),
        "phases_exec_seconds_median": medians(phases["exec"]),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

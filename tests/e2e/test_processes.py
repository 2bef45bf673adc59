"""Processes of a server for every way to start it: their number, kills, and that nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.running import BIN, COMMANDS, KEY, Server, running
from tests.waiting import wait_until

MODEL = "SmolLM2-135M-Instruct"


@pytest.fixture
def config(smollm2_gguf: Path) -> dict[str, Any]:
    return {
        "models": {
            "default": MODEL,
            "preload": [MODEL],
            "available": {MODEL: {"path": str(smollm2_gguf), "max_tokens": 512}},
        }
    }


def chat(server: Server, tokens: int = 2) -> httpx.Response:
    with server.client() as client:
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": tokens}
        return client.post("/v1/chat/completions", json=body)


def workers(server: Server) -> list[psutil.Process]:
    """Return the processes that accept connections on the port."""
    listening = psutil.CONN_LISTEN
    found = []
    for process in server.processes():
        connections = process.net_connections("tcp")
        if any(c.status == listening and c.laddr.port == server.port for c in connections):
            found.append(process)
    return found


def established(process: psutil.Process, port: int) -> int:
    found = process.net_connections("tcp")
    return sum(one.status == psutil.CONN_ESTABLISHED and one.laddr.port == port for one in found)


@pytest.mark.parametrize(
    ("command", "number"),
    [
        ("serve", 1),
        pytest.param("serve", 2, marks=pytest.mark.story),
        pytest.param("main", 1, marks=pytest.mark.story),
        ("main", 2),
        ("gunicorn", 1),
        pytest.param("gunicorn", 2, marks=pytest.mark.story),
    ],
)
def test_each_way_to_start_serves_and_stops_cleanly(
    tmp_path: Path, config: dict[str, Any], command: str, number: int
) -> None:
    config["server"] = {"workers": number}
    with running(tmp_path, config, command=command) as server:
        assert chat(server).status_code == 200
        assert len(server.engines()) == 1
        assert server.manager().is_running()
        assert list((server.run_dir / "engines").iterdir()) != []
    assert not server.run_dir.exists() or list((server.run_dir / "engines").iterdir()) == []
    assert not (server.run_dir / "manager.sock").exists()
    with running(tmp_path, config, command=command) as again:
        assert chat(again).status_code == 200


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_connections_spread_evenly_over_workers(tmp_path: Path, config: dict[str, Any], command: str) -> None:
    count, clients = 4, 64
    config["server"] = {"workers": count}
    config["models"]["preload"] = []
    with running(tmp_path, config, command=command) as server:
        wait_until(lambda: len(spread(server, clients)) == count)  # some start later than others
        held = spread(server, clients)
    assert sum(held) == clients
    assert min(held) >= clients / count / 3


def spread(server: Server, clients: int) -> list[int]:
    """Open `clients` connections and return the number of each process that has any."""
    with contextlib.ExitStack() as stack:
        for _ in range(clients):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            client.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
        held = [established(process, server.port) for process in server.processes()]
    return [number for number in held if number]


def test_worker_killed_during_a_health_check_is_replaced_at_once(tmp_path: Path, config: dict[str, Any]) -> None:
    """A stopped worker cannot respond to the health check, so the main process waits for it."""
    config["server"] = {"workers": 2}
    config["models"]["preload"] = []
    with running(tmp_path, config) as server:
        wait_until(lambda: len(_workers(server)) == 2)
        victim = min(_workers(server))
        process = psutil.Process(victim)
        process.suspend()
        wait_until(lambda: waits_for_a_worker(server))
        process.kill()
        wait_until(lambda: len(_workers(server) - {victim}) == 2, timeout=40)  # the health check would take 60


def waits_for_a_worker(server: Server) -> bool:
    """Return whether the main process waits for a response to its health check: a long wait only if a worker hangs."""
    assert server.process is not None
    return "poll" in Path(f"/proc/{server.process.pid}/wchan").read_text()


def _workers(server: Server) -> set[int]:
    try:
        with server.client(timeout=5) as client:
            return {*client.get("/admin/api/status").json()["workers"]}
    except httpx.TransportError:
        return set()


def test_gunicorn_worker_killed_with_sigkill_unloads_nothing(tmp_path: Path, config: dict[str, Any]) -> None:
    config["server"] = {"workers": 2}
    with running(tmp_path, config, command="gunicorn") as server:
        wait_until(lambda: server.models()[MODEL]["state"] == "ready")
        (engine,) = server.engines()
        manager = server.manager()
        assert server.process is not None
        master = psutil.Process(server.process.pid)
        # A worker may have started the manager and so be its parent.
        before = {p.pid for p in master.children() if "manager.main" not in " ".join(p.cmdline())}
        assert len(before) == 2
        for victim in before:
            os.kill(victim, signal.SIGKILL)
            wait_until(lambda victim=victim: not psutil.pid_exists(victim))
            wait_until(lambda: _answers(server))
        assert server.manager().pid == manager.pid
        assert [process.pid for process in server.engines()] == [engine.pid]
        assert server.models()[MODEL]["state"] == "ready"


def _answers(server: Server) -> bool:
    try:
        return chat(server).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.story
def test_streams_outlive_a_killed_manager_and_the_next_one_adopts_the_engine(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    with running(tmp_path, config) as server:
        wait_until(lambda: server.models()[MODEL]["state"] == "ready")
        (engine,) = server.engines()
        old = server.manager()
        body = {"prompt": "Once", "max_tokens": 400, "stream": True, "ignore_eos": True}
        with server.client() as client, client.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            old.kill()
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
        wait_until(lambda: chat(server).status_code == 200)
        wait_until(server.has_manager)
        assert server.manager().pid != old.pid
        assert [process.pid for process in server.engines()] == [engine.pid]


def test_server_starts_after_all_its_processes_were_killed(tmp_path: Path, config: dict[str, Any]) -> None:
    server = Server(tmp_path, config)
    try:
        server.start()
        wait_until(lambda: server.models()[MODEL]["state"] == "ready")
        server.kill_all()
    finally:
        server.kill_all()
    with running(tmp_path, config) as again:
        assert chat(again).status_code == 200
        assert len(again.engines()) == 1


def test_sigterm_lets_a_stream_finish(tmp_path: Path, config: dict[str, Any]) -> None:
    config["server"] = {"drain_timeout": 120}
    with running(tmp_path, config) as server:
        assert chat(server).status_code == 200
        body = {"prompt": "Once", "max_tokens": 200, "stream": True, "ignore_eos": True}
        with server.client() as client, client.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            with ThreadPoolExecutor(1) as pool:
                code = pool.submit(server.stop)
                rest = [line for line in lines if line]
                assert code.result() == 0
        assert rest[-1] == "data: [DONE]"


def test_bad_configuration_is_reported_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("server:\n  prot: 1\nmodels:\n  default: nothing\n")
    for command in COMMANDS.values():
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        output = result.stdout + result.stderr
        assert result.returncode != 0
        assert "prot" in output
        assert "port" in output
        assert "nothing" in output
        assert "Traceback" not in output


def test_busy_port_is_reported_in_one_line(tmp_path: Path, config: dict[str, Any]) -> None:
    with running(tmp_path, config) as server:
        second = tmp_path / "second"
        second.mkdir()
        other = Server(second, {**config, "server": {"port": server.port}})
        result = subprocess.run(COMMANDS["serve"], cwd=second, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 1
        assert str(server.port) in result.stdout + result.stderr
        assert "Traceback" not in result.stderr
        assert other.processes() == []


def test_command_line_lists_loads_and_unloads_models(tmp_path: Path, config: dict[str, Any]) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [str(BIN / "llm-api-server"), *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)

    with running(tmp_path, config) as server:
        wait_until(lambda: server.models()[MODEL]["state"] == "ready")
        (listed,) = json.loads(run("models", "list", "--json").stdout)
        assert (listed["id"], listed["state"]) == (MODEL, "ready")
        assert run("models", "unload", MODEL).returncode == 0
        assert server.engines() == []
        assert run("models", "load", MODEL).returncode == 0
        assert len(server.engines()) == 1
        unknown = run("models", "load", "nothing")
        assert unknown.returncode == 1
        assert "nothing" in unknown.stderr
        assert KEY not in run("models", "list").stdout
    assert run("models", "list").returncode == 3

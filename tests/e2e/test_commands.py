"""`status`, `logs`, `doctor`, `chat` and `bench` against a real server with a real model, as users run them."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import psutil
import pytest

from tests.running import BIN, KEY, Server, environment, running
from tests.waiting import wait_until

MODEL = "SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, smollm2_gguf: Path) -> Iterator[Server]:
    config: dict[str, Any] = {
        "server": {"workers": 2},
        "models": {
            "default": MODEL,
            "available": {MODEL: {"path": str(smollm2_gguf), "max_tokens": 4096, "aliases": ["s"]}},
        },
    }
    with running(tmp_path_factory.mktemp("commands"), config) as one:
        yield one


class Terminal:
    """A command on a terminal of its own; a context manager."""

    def __init__(self, server: Server, *words: str) -> None:
        self._descriptor, inner = pty.openpty()
        termios.tcsetwinsize(self._descriptor, (40, 120))
        self._process = subprocess.Popen(
            [str(BIN / "llm-api-server"), *words], cwd=server.folder, env=environment(TERM="xterm"),
            stdin=inner, stdout=inner, stderr=inner, preexec_fn=_own_terminal,  # noqa: PLW1509 - it starts no threads
        )  # fmt: skip
        os.close(inner)
        self.seen = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._descriptor)

    def type(self, text: str) -> None:
        self.seen = ""
        os.write(self._descriptor, text.encode())

    def shows(self, text: str) -> None:
        """Wait until `text` appears after the last input."""
        wait_until(lambda: self._read() and text in self.seen)

    def ends(self) -> int:
        wait_until(lambda: self._read() and self._process.poll() is not None)
        return self._process.returncode

    def _read(self) -> bool:
        while select.select([self._descriptor], [], [], 0)[0]:
            try:
                data = os.read(self._descriptor, 65536)
            except OSError:  # as Linux reports that the other end is closed
                break
            self.seen += data.decode(errors="replace")
        return True


def _own_terminal() -> None:
    """Make Ctrl-C a signal to the command."""
    os.setsid()
    os.close(os.open(os.ttyname(0), os.O_RDWR))


def test_status_shows_processes_and_models(server: Server) -> None:
    with server.client() as client:
        client.post(f"/admin/api/models/{MODEL}/load").raise_for_status()
    found = json.loads(server.command("status", "--json").stdout)
    assert server.process is not None
    assert (found["url"], found["pid"]) == (server.url, server.process.pid)
    assert found["manager"] == server.manager().pid
    assert {psutil.Process(pid).ppid() for pid in found["workers"]} == {server.process.pid}
    assert len(found["workers"]) == 2
    assert psutil.Process(server.process.pid).create_time() - 1 <= found["started_at"]
    (model,) = found["models"]
    assert (model["id"], model["state"]) == (MODEL, "ready")
    (ram,) = [device for device in found["devices"] if device["id"] == "ram"]
    assert ram["taken"][MODEL] > 0
    assert ram["free"] < ram["total"]
    screen = server.command("status").stdout
    assert f"{server.url}/v1" in screen
    assert "requests: 0 in flight, 0 waiting" in screen


def test_status_counts_requests_in_flight(server: Server) -> None:
    body = {"prompt": "Once", "max_tokens": 4000, "stream": True, "ignore_eos": True}

    def in_flight() -> int:
        return int(json.loads(server.command("status", "--json").stdout)["in_flight"])

    with server.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        wait_until(lambda: in_flight() == 1)
    wait_until(lambda: in_flight() == 0)


def test_status_refreshes_until_ctrl_c(server: Server) -> None:
    with Terminal(server, "status", "--watch") as terminal:
        terminal.shows("Ctrl-C ends.")
        terminal.type("")
        terminal.shows("Ctrl-C ends.")
        terminal.type("\x03")
        assert terminal.ends() == 0
    assert server.command("status", "--watch").returncode == 2, "there is no terminal"


def test_status_finds_a_port_given_on_the_command_line(tmp_path: Path) -> None:
    server = Server(tmp_path, {})
    port, other = server.port, str(server.port)
    server.configure({"server": {"port": 1}})
    server._command = [*server._command, "--port", other]
    try:
        server.start()
        assert json.loads(server.command("status", "--json").stdout)["url"] == f"http://127.0.0.1:{port}"
        assert f"responds at http://127.0.0.1:{port}" in server.command("doctor").stdout
        assert server.stop() == 0
    finally:
        server.kill_all()


def test_logs_are_shown_and_followed(server: Server) -> None:
    shown = server.command("logs", "-n", "1000").stdout
    assert "gateway | " in shown
    assert "manager | " in shown
    assert "manager ready" in server.command("logs", "manager").stdout
    assert server.command("models", "load", MODEL).returncode == 0
    assert server.command("logs", "s").stdout == server.command("logs", MODEL).stdout != ""
    with Terminal(server, "logs", "-f", "-n", "0") as terminal:
        # Lines written before the command opened the files are not shown.
        wait_until(
            lambda: server.command("reload").returncode == 0 and terminal._read() and "manager |" in terminal.seen
        )
        terminal.type("\x03")
        assert terminal.ends() == 0


def test_doctor_reports_a_running_server_as_healthy(server: Server) -> None:
    done = server.command("doctor", "--json")
    assert done.returncode == 0, done.stdout
    found = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert server.url in found["port"]["message"]
    assert {found[name]["verdict"] for name in ("llama.cpp", "configuration", "run directory", "database")} == {"ok"}
    assert server.command("doctor").stdout.startswith("ok ")


def ask(server: Server, prompt: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "llm-api-server"), "chat", "--max-tokens", "20", *words]
    return subprocess.run(
        command, cwd=server.folder, env=environment(**variables), input=prompt, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip


def test_chat_serves_a_script(server: Server) -> None:
    done = ask(server, "Say hello.")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()
    assert ask(server, "Say hello.", "s", "--url", server.url, LLM_API_SERVER_KEY=KEY).returncode == 0
    refused = ask(server, "Say hello.", "--url", server.url)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "LLM_API_SERVER_KEY" in refused.stderr


def test_chat_keeps_a_conversation_until_ctrl_d(server: Server) -> None:
    with Terminal(server, "chat", "--system", "Be brief.", "--max-tokens", "5") as terminal:
        for line, response in (("/nothing", "Unknown command /nothing"), ("/reset", "New conversation.")):
            terminal.shows("> ")
            terminal.type(f"{line}\n")
            terminal.shows(response)
        before = requests_of(server)
        terminal.shows("> ")
        terminal.type("Say hello.\n")
        wait_until(lambda: requests_of(server) == before + 1)
        terminal.shows("\n> ")
        terminal.type("\x04")
        assert terminal.ends() == 0


def test_ctrl_c_stops_a_response_and_not_the_conversation(server: Server) -> None:
    with server.client() as client:
        client.post(f"/admin/api/models/{MODEL}/load").raise_for_status()
    (engine,) = server.engines()
    with Terminal(server, "chat") as terminal:
        terminal.shows("> ")
        engine.suspend()  # so that the response is still in progress
        try:
            terminal.type("Say hello.\n")
            wait_until(lambda: server.models()[MODEL]["in_flight"] == 1)
            terminal.type("\x03")
            terminal.shows("[stopped]")
            terminal.shows("\n> ")
        finally:
            engine.resume()
        wait_until(lambda: server.models()[MODEL]["in_flight"] == 0)
        terminal.type("/exit\n")
        assert terminal.ends() == 0


def requests_of(server: Server) -> int:
    """Return the number of chats in the ledger."""
    rows = json.loads(server.command("usage", "--requests", "--json", "--limit", "1000").stdout)["data"]
    return sum(row["endpoint"] == "/v1/chat/completions" for row in rows)


def test_bench_measures_and_its_requests_are_in_the_ledger(server: Server) -> None:
    before = requests_of(server)
    done = server.command(
        "bench", MODEL, "--requests", "4", "--concurrency", "2", "--prompt-tokens", "40", "--max-tokens", "8", "--json"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["requests_ok"], found["requests_failed"]) == (4, 0)
    assert 20 <= found["prompt_tokens_mean"] <= 80
    assert 0 < found["completion_tokens_mean"] <= 8
    assert found["ttft_seconds"]["p50"] <= found["ttft_seconds"]["p99"] <= found["seconds"]
    wait_until(lambda: requests_of(server) == before + 5)


def test_commands_report_that_no_server_runs(tmp_path: Path) -> None:
    server = Server(tmp_path, {})
    for words in (["status"], ["bench"]):
        done = server.command(*words)
        assert (done.returncode, "llm-api-server serve" in done.stderr) == (3, True)
    assert ask(server, "Hi").returncode == 3
    assert server.command("logs").returncode == 1
    assert "no server runs" in server.command("doctor").stdout

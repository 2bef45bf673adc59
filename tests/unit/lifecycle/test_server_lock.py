"""One server per configuration, a clear word when the port is not to be had, and stopping that waits for the end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from llm_api_server.config.load import CONFIG_VARIABLE
from llm_api_server.config.models import Config
from llm_api_server.lifecycle.running_server import stop_manager, stop_server
from llm_api_server.lifecycle.server_lock import CannotServe, ServerLock, listen
from llm_api_server.serving import gunicorn_hooks
from llm_api_server.serving.gunicorn_hooks import bind_address

HOLDER = """
import signal, sys
from pathlib import Path
from llm_api_server.lifecycle.server_lock import ServerLock
ServerLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
signal.sigwait({signal.SIGTERM})
"""


@contextlib.contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock until SIGTERM."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def config(folder: Path, **server: object) -> Config:
    return Config.model_validate({"server": {"run_dir": str(folder), **server}, "source": folder / "config.yaml"})


def test_a_second_server_is_told_of_the_first(tmp_path: Path) -> None:
    with holder(tmp_path) as first:
        assert ServerLock(tmp_path).holder() == first.pid
        with pytest.raises(CannotServe, match=rf"pid {first.pid}.*llm-api-server stop"):
            ServerLock(tmp_path).acquire()
    assert ServerLock(tmp_path).holder() is None
    with holder(tmp_path) as next_one:
        assert ServerLock(tmp_path).holder() == next_one.pid


def test_a_killed_server_holds_nothing(tmp_path: Path) -> None:
    with holder(tmp_path) as first:
        first.kill()
        first.wait()
        assert ServerLock(tmp_path).holder() is None


def test_a_server_that_has_not_told_its_pid_is_not_signalled(tmp_path: Path) -> None:
    with holder(tmp_path):
        (tmp_path / "server.lock").write_bytes(b"")
        assert ServerLock(tmp_path).holder() is None


def test_stop_ends_the_server_and_waits(tmp_path: Path) -> None:
    with holder(tmp_path) as server:
        assert stop_server(config(tmp_path))
        assert ServerLock(tmp_path).holder() is None
        assert server.wait() in {0, -signal.SIGTERM}


def test_stopping_nothing_is_not_an_error(tmp_path: Path) -> None:
    assert not stop_server(config(tmp_path))
    assert not stop_manager(config(tmp_path / "never"))
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "manager.sock"))
    assert not stop_manager(config(tmp_path)), "a socket that nobody listens on"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", ""])
def test_a_port_is_listened_on_at_once(host: str) -> None:
    with listen(host, 0) as listener, socket.create_connection(("127.0.0.1", listener.getsockname()[1])):
        assert os.get_inheritable(listener.fileno())


def test_a_taken_port_is_named_with_the_way_out() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(CannotServe, match=rf"Port {port} on 127.0.0.1 is in use.*--port"):
            listen("127.0.0.1", port)


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid", "2001:db8::1"])
def test_an_address_of_elsewhere_is_named(host: str) -> None:
    with pytest.raises(CannotServe, match=f"Cannot listen on {host}.*server.host"):
        listen(host, 0)


@pytest.mark.parametrize(("host", "expected"), [("0.0.0.0", "0.0.0.0:81"), ("::1", "[::1]:81"), ("[::]", "[::]:81")])
def test_gunicorn_gets_an_address_it_can_read(tmp_path: Path, host: str, expected: str) -> None:
    assert bind_address(config(tmp_path, host=host, port=81).server) == expected


def test_a_bad_file_ends_gunicorn_with_its_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("server: {prot: 1}\n")
    monkeypatch.setenv(CONFIG_VARIABLE, str(path))
    with pytest.raises(SystemExit) as caught:
        gunicorn_hooks.config_for_gunicorn()
    assert caught.value.code == 2
    assert "config.yaml:1: server.prot" in capsys.readouterr().err


@pytest.mark.parametrize(("reexec", "master", "stops"), [(0, 0, True), (7, 0, False), (0, 7, False)])
def test_masters_that_take_over_leave_the_manager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reexec: int, master: int, stops: bool
) -> None:
    stopped: list[Config] = []
    monkeypatch.setattr(gunicorn_hooks, "stop_manager", stopped.append)
    gunicorn_hooks.on_gunicorn_exit(SimpleNamespace(reexec_pid=reexec, master_pid=master), config(tmp_path))
    assert bool(stopped) is stops


def test_only_the_first_master_takes_the_lock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with holder(tmp_path):
        gunicorn_hooks.on_gunicorn_start(SimpleNamespace(master_pid=7), config(tmp_path))
        with pytest.raises(SystemExit) as caught:
            gunicorn_hooks.on_gunicorn_start(SimpleNamespace(master_pid=0), config(tmp_path))
    assert caught.value.code == 1
    assert "running already" in capsys.readouterr().err

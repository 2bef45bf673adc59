"""The lock of a run directory, and clear errors for a port that cannot be used."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from llm_api_server.lifecycle.server_lock import CannotServe, ServerLock, listen
from tests.lock_holder import holder


def test_a_second_server_names_the_first_and_the_remedy(tmp_path: Path) -> None:
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


def test_a_lock_without_a_pid_has_no_holder(tmp_path: Path) -> None:
    with holder(tmp_path):
        (tmp_path / "server.lock").write_bytes(b"")
        assert ServerLock(tmp_path).holder() is None


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", ""])
def test_a_listening_socket_accepts_at_once_and_is_inherited(host: str) -> None:
    with listen(host, 0) as listener, socket.create_connection(("127.0.0.1", listener.getsockname()[1])):
        assert os.get_inheritable(listener.fileno())


def test_a_taken_port_is_named_with_the_remedy() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(CannotServe, match=rf"Port {port} on 127.0.0.1 is in use.*--port"):
            listen("127.0.0.1", port)


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid", "2001:db8::1"])
def test_an_address_of_another_machine_is_named(host: str) -> None:
    with pytest.raises(CannotServe, match=f"Cannot listen on {host}.*server.host"):
        listen(host, 0)

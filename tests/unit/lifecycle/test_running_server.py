"""Stopping a server from outside waits for its end."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

from llm_api_server.lifecycle.running_server import RunningServer
from llm_api_server.lifecycle.server_lock import ServerLock
from tests.lock_holder import holder


def test_stop_ends_the_server_and_waits(tmp_path: Path) -> None:
    with holder(tmp_path) as server:
        assert RunningServer(tmp_path, 10).stop()
        assert ServerLock(tmp_path).holder() is None
        assert server.wait() in {0, -signal.SIGTERM}


def test_stopping_nothing_is_not_an_error(tmp_path: Path) -> None:
    assert not RunningServer(tmp_path, 10).stop()
    assert not RunningServer(tmp_path / "never", 10).stop_manager()


def test_a_manager_that_was_killed_is_not_running(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "manager.sock"))
    assert not RunningServer(tmp_path, 10).stop_manager()

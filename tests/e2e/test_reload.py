"""Reload of the configuration under load: all workers follow together, and a bad file changes nothing."""

from __future__ import annotations

import copy
import json
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.running import KEY, KEYS, RESTRICTED_KEY, Server, running
from tests.waiting import wait_until

MODEL, OTHER = "SmolLM2-135M-Instruct", "other"
NEW_KEY = "sk-new-0123456789abcdef"
#: Enough connections that each worker gets some.
EACH_WORKER = 24


@pytest.fixture
def config(smollm2_gguf: Path) -> dict[str, Any]:
    entry = {"path": str(smollm2_gguf), "max_tokens": 2048}
    return {
        "server": {"workers": 2},
        "models": {
            "default": MODEL,
            "preload": [MODEL],
            "max_loaded": 2,
            "available": {MODEL: dict(entry), OTHER: dict(entry)},
        },
    }


@pytest.fixture
def server(tmp_path: Path, config: dict[str, Any]) -> Iterator[Server]:
    with running(tmp_path, config) as one:
        wait_until(lambda: one.models()[MODEL]["state"] == "ready")
        yield one


def changed(config: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """Return a copy of `config` with values at paths such as `models__max_loaded`."""
    config = copy.deepcopy(config)
    for path, value in keys.items():
        *sections, last = path.split("__")
        section = config
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = value
    return config


def body(**more: Any) -> dict[str, Any]:
    return {"prompt": "Once upon a time", "max_tokens": 2, **more}


def ask(server: Server, key: str = KEY, **more: Any) -> httpx.Response:
    """Send a completion on a connection of its own, which any worker may accept."""
    with server.client(key) as client:
        return client.post("/v1/completions", json=body(**more))


def statuses(server: Server, key: str = KEY, model: str = MODEL) -> set[int]:
    """Return the statuses of requests about a model, on enough new connections to reach all workers."""
    found = set()
    for _ in range(EACH_WORKER):
        with server.client(key) as client:
            found.add(client.get(f"/v1/models/{model}").status_code)
    return found


class Stream(threading.Thread):
    """A long stream in a thread; `pieces` are its events so far."""

    def __init__(self, server: Server, tokens: int = 400, **more: Any) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._body = body(stream=True, max_tokens=tokens, ignore_eos=True, **more)
        self.pieces: list[str] = []
        self.last = ""
        self.start()
        wait_until(lambda: self.pieces)

    def run(self) -> None:
        with (
            self._server.client() as client,
            client.stream("POST", "/v1/completions", json=self._body, timeout=600) as response,
        ):
            for line in response.iter_lines():
                if line.startswith("data: "):
                    self.last = line
                    self.pieces.append(line)

    def ends_whole(self) -> bool:
        self.join()
        return self.last == "data: [DONE]" and '"finish_reason":"length"' in self.pieces[-2]


def by_signal(server: Server) -> None:
    assert server.process is not None
    before = server.output().count("configuration reloaded")
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: server.output().count("configuration reloaded") > before)


def by_command(server: Server) -> None:
    done = server.command("reload")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("Applied.\n")


def by_api(server: Server) -> None:
    with server.client() as client:
        response = client.post("/admin/api/reload").raise_for_status().json()
    assert response["applied"]
    assert response["late_workers"] == 0


@pytest.mark.parametrize(
    ("command", "workers", "way"),
    [
        ("serve", 1, by_signal),
        ("serve", 1, by_api),
        pytest.param("serve", 2, by_signal, marks=pytest.mark.story),
        ("main", 2, by_command),
        ("gunicorn", 2, by_signal),
        ("gunicorn", 2, by_api),
    ],
)
def test_all_workers_follow_a_reload_and_running_requests_continue(
    tmp_path: Path, config: dict[str, Any], command: str, workers: int, way: Callable[[Server], None]
) -> None:
    config["server"]["workers"] = workers
    with running(tmp_path, config, command=command) as server:
        wait_until(lambda: server.models()[MODEL]["state"] == "ready")
        (engine,) = server.engines()
        stream = Stream(server)
        key = {"key": NEW_KEY, "name": "new", "permissions": ["completions"]}
        entries = copy.deepcopy(config["models"]["available"])
        entries[MODEL]["aliases"] = ["nick"]
        server.configure(changed(config, auth__api_keys=[KEYS[0], key], models__available=entries))
        way(server)
        assert statuses(server, NEW_KEY, model="nick") == {200}
        assert ask(server, NEW_KEY, model="nick").status_code == 200
        assert statuses(server, RESTRICTED_KEY) == {401}
        assert stream.is_alive()
        assert server.engines() == [engine]
        assert stream.ends_whole()


def test_bad_file_changes_nothing(server: Server, config: dict[str, Any]) -> None:
    bad = changed(config, models__max_loaded=0, server__prot=1)
    server.configure(bad)
    refused = server.command("reload")
    assert refused.returncode == 2
    assert "models.max_loaded" in refused.stderr
    assert "did you mean 'port'" in refused.stderr
    with server.client() as client:
        response = client.post("/admin/api/reload")
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_configuration"
    assert "models.max_loaded" in response.json()["error"]["message"]
    assert server.process is not None
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: server.output().count("the configuration is not reloaded") == 2)
    assert statuses(server) == {200}
    assert MODEL in server.command("models", "list").stdout
    assert server.command("stop").returncode == 0
    assert server.process.wait() == 0
    server.configure(config)
    server.start()


def test_processes_started_while_the_file_is_bad_use_the_applied_configuration(
    server: Server, config: dict[str, Any]
) -> None:
    key = {"key": NEW_KEY, "name": "new"}
    server.configure(changed(config, auth__api_keys=[KEYS[0], key]))
    by_command(server)
    (server.folder / "config.yaml").write_text("server: [", encoding="utf-8")
    (engine,) = server.engines()
    server.manager().kill()
    wait_until(server.has_manager)
    assert server.process is not None
    for worker in psutil.Process(server.process.pid).children():
        if any("spawn_main" in word for word in worker.cmdline()):
            worker.kill()
    wait_until(lambda: statuses_or_none(server, NEW_KEY) == {200})
    assert server.engines() == [engine]
    server.configure(config)


def statuses_or_none(server: Server, key: str) -> set[int] | None:
    try:
        return statuses(server, key)
    except httpx.TransportError:
        return None


def test_dry_run_changes_nothing(server: Server, config: dict[str, Any]) -> None:
    server.configure(changed(config, models__max_loaded=1, server__port=1, auth__api_keys=[KEYS[0]]))
    shown = server.command("reload", "--dry-run")
    assert shown.stdout.splitlines() == [
        f"server.port: {server.port} -> 1 (after a restart)",
        "auth.api_keys.restricted: removed: name: restricted, permissions: ['chat']",
        "models.max_loaded: 2 -> 1",
        "Dry run: nothing was changed.",
    ]
    changes = json.loads(server.command("reload", "--dry-run", "--json").stdout)
    assert changes["applied"] is False
    assert [change["effect"] for change in changes["changes"]] == ["restart", "now", "now"]
    with server.client(RESTRICTED_KEY) as client:
        assert client.get("/v1/models").status_code == 200
    applied = server.command("reload")
    assert applied.stdout.endswith("Applied, except for 1 that take effect when the server is restarted.\n")
    assert server.command("reload").stdout.startswith(f"server.port: {server.port} -> 1 (after a restart)\n")
    server.configure(config)


def test_changed_model_finishes_its_requests_and_is_loaded_anew(server: Server, config: dict[str, Any]) -> None:
    stream = Stream(server)
    (engine,) = server.engines()
    entries = copy.deepcopy(config["models"]["available"])
    entries[MODEL]["max_tokens"] = 1024
    server.configure(changed(config, models__available=entries))
    by_command(server)
    assert server.models()[MODEL]["state"] == "draining"
    assert ask(server).status_code == 200  # after it waited
    assert stream.ends_whole()
    (after,) = server.engines()
    assert after.pid != engine.pid
    assert server.models()[MODEL]["context_length"] == 1024


def test_reload_adds_and_removes_models(server: Server, config: dict[str, Any]) -> None:
    stream = Stream(server)
    entry = config["models"]["available"][MODEL]
    available = {"third": entry, OTHER: entry}
    server.configure(changed(config, models__default="third", models__preload=[], models__available=available))
    by_command(server)
    assert stream.is_alive()
    assert statuses(server, model=MODEL) == {404}
    assert ask(server, model="third").status_code == 200
    assert {model["id"] for model in server.models().values()} == {"third", OTHER}
    assert stream.ends_whole()
    wait_until(lambda: len(server.engines()) == 1)
    server.configure(config)
    by_command(server)
    assert ask(server, model=MODEL).status_code == 200


def test_manager_left_by_a_killed_server_follows_the_file(tmp_path: Path, config: dict[str, Any]) -> None:
    config["server"]["workers"] = 1
    with running(tmp_path, config) as server:
        wait_until(lambda: server.models()[MODEL]["state"] == "ready")
        (engine,) = server.engines()
        assert server.process is not None
        server.process.kill()
        server.process.wait()
        server.configure(changed(config, auth__api_keys=[{"key": NEW_KEY, "name": "new"}]))
        server.start()
        with server.client(NEW_KEY) as client:
            assert client.get("/admin/api/models").json()["data"][0]["state"] == "ready"
        assert server.engines() == [engine]
        assert ask(server).status_code == 401
        server.process.kill()
        server.process.wait()
        server.configure(changed(config, devices__memory="8GiB"))
        server.start()
        wait_until(lambda: server.models()[MODEL]["state"] == "ready")
        assert not engine.is_running()

"""Real vLLM engines forked from the zygote: the same output as by exec, nothing inherited, nothing left behind."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.running import Server, running
from tests.waiting import wait_until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

MODEL = "smol"
PROMPTS = ["The capital of France is", "One two three four", "Once upon a time"]


def config_for(model: Path, python: Path, *, zygote: bool) -> dict[str, Any]:
    return {
        "server": {"timeout": 300},
        "models": {
            "default": MODEL,
            "max_loaded": 2,
            "available": {MODEL: {"path": str(model), "type": "llama", "max_tokens": 1024}},
        },
        "engines": {"vllm": {"python": str(python), "zygote": zygote}},
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, smollm2_folder: Path, vllm_python: Path) -> Iterator[Server]:
    config = config_for(smollm2_folder, vllm_python, zygote=True)
    with running(tmp_path_factory.mktemp("forked"), config) as server:
        yield server


def complete(server: Server, prompt: str = "Hello", tokens: int = 8) -> Any:
    with server.client(timeout=300) as client:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        return client.post("/v1/completions", json=body)


def responses(server: Server) -> list[str]:
    return [complete(server, prompt, 12).raise_for_status().json()["choices"][0]["text"] for prompt in PROMPTS]


def zygotes(server: Server) -> list[psutil.Process]:
    """Return the zygotes, including one that still imports."""
    return [p for p in server.manager().children() if "engines/vllm/zygote.py" in " ".join(p.cmdline())]


def zygote(server: Server) -> psutil.Process:
    (process,) = zygotes(server)
    return process


def below_guard(server: Server) -> list[psutil.Process]:
    """Return the API server of the engine, then its core and workers."""
    found: list[psutil.Process] = psutil.Process(server.models()[MODEL]["pid"]).children(recursive=True)
    return found


def unload(server: Server) -> None:
    with server.client() as client:
        client.post(f"/admin/api/models/{MODEL}/unload").raise_for_status()


def test_forked_and_execed_engines_generate_the_same(
    server: Server, tmp_path: Path, smollm2_folder: Path, vllm_python: Path
) -> None:
    forked = responses(server)
    assert psutil.Process(server.models()[MODEL]["pid"]).ppid() == zygote(server).pid
    unload(server)
    with running(tmp_path, config_for(smollm2_folder, vllm_python, zygote=False)) as plain:
        assert responses(plain) == forked
        assert zygotes(plain) == []


def test_engine_inherits_nothing_from_the_zygote(server: Server) -> None:
    complete(server).raise_for_status()
    parent = zygote(server)
    engine = below_guard(server)[0]
    assert os.getsid(engine.pid) == os.getpgid(engine.pid) == server.models()[MODEL]["pid"]
    inherited = {str(link.readlink()) for link in Path(f"/proc/{parent.pid}/fd").iterdir()}
    sockets = {name for name in inherited if name.startswith("socket:")}
    for process in below_guard(server):
        kept = {str(link.readlink()) for link in Path(f"/proc/{process.pid}/fd").iterdir()}
        assert not kept & sockets
        assert str(server.folder / "logs" / "zygote.log") not in kept
    titles = [" ".join(process.cmdline()) for process in below_guard(server)]
    assert "-m vllm.entrypoints.openai.api_server --model" in titles[0]
    assert not any("zygote" in title for title in titles)
    assert parent.num_threads() == 1


def test_load_phases_are_shown(server: Server) -> None:
    complete(server).raise_for_status()
    status = server.models()[MODEL]
    assert list(status["phases"]) == ["process", "imports", "configuration", "weights", "kv_cache", "server", "warm_up"]
    assert sum(status["phases"].values()) == pytest.approx(status["load_seconds"], abs=0.1)
    assert status["phase"] is None


def test_killed_zygote_leaves_its_engines_and_is_replaced(server: Server) -> None:
    complete(server).raise_for_status()
    instance, first = server.models()[MODEL]["instance"], zygote(server)
    first.kill()
    wait_until(lambda: not first.is_running() or first.status() == psutil.STATUS_ZOMBIE)
    complete(server).raise_for_status()
    assert server.models()[MODEL]["instance"] == instance
    unload(server)
    complete(server).raise_for_status()
    assert psutil.Process(server.models()[MODEL]["pid"]).ppid() == zygote(server).pid != first.pid


@pytest.mark.parametrize("victim", ["EngineCore", "Worker"])
def test_killed_engine_process_fails_its_requests_and_the_next_one_reloads(server: Server, victim: str) -> None:
    complete(server).raise_for_status()
    before = below_guard(server)
    instance = server.models()[MODEL]["instance"]
    (process,) = [p for p in before if victim in " ".join(p.cmdline())]
    outcome: list[Any] = []
    request = threading.Thread(target=lambda: outcome.append(complete(server, tokens=900)))
    request.start()
    wait_until(lambda: server.models()[MODEL]["in_flight"] == 1)
    process.send_signal(signal.SIGKILL)
    request.join()
    assert outcome[0].status_code in {500, 502, 503}
    assert outcome[0].json()["error"]["message"]
    wait_until(lambda: not any(is_alive(process) for process in before))
    wait_until(lambda: complete(server).status_code == 200, timeout=120)
    assert server.models()[MODEL]["instance"] != instance


def test_engine_killed_while_loading_is_a_failed_load_and_leaves_nothing(server: Server) -> None:
    wait_until(lambda: server.models()[MODEL]["state"] != "failed")
    unload(server)
    outcome: list[Any] = []
    request = threading.Thread(target=lambda: outcome.append(complete(server)))
    request.start()
    wait_until(lambda: (server.models()[MODEL]["phase"] or "") in {"configuration", "weights"})
    processes = below_guard(server)
    processes[0].kill()
    request.join()
    assert (outcome[0].status_code, outcome[0].json()["error"]["code"]) == (503, "model_load_failed")
    wait_until(lambda: not any(is_alive(process) for process in processes))
    wait_until(lambda: complete(server).status_code == 200, timeout=120)


def test_zygote_ends_with_a_killed_manager(server: Server) -> None:
    complete(server).raise_for_status()
    old = zygote(server)
    server.manager().kill()
    wait_until(lambda: not is_alive(old))
    wait_until(lambda: complete(server).status_code == 200)
    wait_until(server.has_manager)
    unload(server)  # the next test finds an engine of the new manager's zygote


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False

"""Contenders: the engine alone, nginx as the limit, this server, and its peers.

Each is started with one worker on one core in front of the same stand-in engine. Peers are installed once, each in an
environment of its own under `.cache/bench`; nginx is the system's.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import psutil
import yaml

from bench.idle import free_port
from bench.speed.processes import CACHE, GATEWAY_CORE, LOAD_CORE, native, started, tree, wait_answer
from llm_api_server.auth.access import digest
from llm_api_server.store.database import Database
from llm_api_server.store.key_fields import Actor, KeyFields
from llm_api_server.store.keys import Keys
from llm_api_server.store.schema import DIGESTS, KEYS

KEY = "sk-bench-0123456789abcdefghijklmnopqrstuvwxyz"
#: Measured versions of the peers.
PEERS = {
    "vllm-router": "vllm-router==0.1.17",
    "sglang-router": "sglang-router==0.3.2",
    "litellm": "litellm[proxy]==1.106.2",
}
#: Limits that never refuse a request but are counted.
_LIMITS = {
    "requests_per_minute": 1_000_000_000,
    "tokens_per_minute": 1_000_000_000_000,
    "max_concurrent": 1_000_000,
    "tokens_per_day": 1_000_000_000_000,
}
_MODEL = "bench"


@dataclass(frozen=True)
class Engine:
    """The stand-in engine, on a port and on a unix socket."""

    port: int
    socket: Path


@dataclass(frozen=True)
class Running:
    """Server at `port`; `pid` is the root of its processes (None for the engine itself)."""

    port: int
    pid: int | None
    #: Pid of the process that forwards bytes, if there are others.
    is_worker: Callable[[psutil.Process], bool] = lambda _: True

    def processes(self) -> list[psutil.Process]:
        return tree(self.pid) if self.pid is not None else []


@contextlib.contextmanager
def engine(folder: Path) -> Iterator[Engine]:
    port, path = free_port(), folder / "engine.sock"
    argv = [str(native("engine")), "--port", str(port), "--unix", str(path)]
    with started(argv, LOAD_CORE, folder=folder, log="engine.log") as pid:
        wait_answer(port, "/v1/models", pid=pid)
        yield Engine(port, path)


@contextlib.contextmanager
def direct(target: Engine, folder: Path) -> Iterator[Running]:  # noqa: ARG001 - all contenders are called alike
    yield Running(target.port, None)


@contextlib.contextmanager
def nginx(target: Engine, folder: Path) -> Iterator[Running]:
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        raise NotInstalled("nginx is not installed: apt install nginx")
    port = free_port()
    (folder / "nginx.conf").write_text(f"""
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/nginx-error.log; user root;
events {{ worker_connections 8192; }}
http {{
  access_log off; client_max_body_size 64m; client_body_buffer_size 16m; client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  keepalive_requests 1000000000;
  upstream engine {{ server unix:{target.socket}; keepalive 1024; keepalive_requests 1000000000; }}
  server {{ listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
    }}
  }}
}}
""")
    argv = [program, "-c", str(folder / "nginx.conf"), "-p", str(folder)]
    with started(argv, GATEWAY_CORE, folder=folder, log="nginx.log") as pid:
        wait_answer(port, "/v1/models", pid=pid)
        yield Running(port, pid)


@contextlib.contextmanager
def ours(
    target: Engine,  # noqa: ARG001 - it starts its own: on a socket, by its manager
    folder: Path,
    *,
    workers: int = 1,
    core: int | str = GATEWAY_CORE,
    keys: list[str] | None = None,
    models: int = 1,
) -> Iterator[Running]:
    """Start the complete server: a key with every limit, ledger, log. With `keys`, that many store keys instead."""
    shutil.rmtree(folder / "ours", ignore_errors=True)
    home = folder / "ours"
    home.mkdir()
    port = free_port()
    config = write_config(home, port, workers=workers, models=models)
    if keys:
        fill_store(config, keys)
    command = [str(Path(sys.executable).with_name("llm-api-server")), "serve", "--config", str(config)]
    with started(command, core, folder=home, log="server.log") as pid:
        wait_answer(port, "/readyz", pid=pid)
        ask = json.dumps({"model": _MODEL, "messages": [{"role": "user", "content": "hi"}]}).encode()
        headers = {"authorization": f"Bearer {keys[0] if keys else KEY}", "content-type": "application/json"}
        wait_answer(port, "/v1/chat/completions", pid=pid, headers=headers, body=ask)  # loads the engine
        yield Running(port, pid, lambda process: not _is_of_manager(process))


def write_config(home: Path, port: int, *, workers: int = 1, models: int = 1) -> Path:
    """Write a configuration whose `engines.vllm.python` starts the stand-in engine."""
    python = home / "python"
    python.write_text(
        "#!/bin/sh\n"
        '[ "$1" = -c ] && { echo \'{"tool": [], "reasoning": [], "files": []}\'; exit; }\n'
        f'exec taskset -c {LOAD_CORE} {native("engine")} "$@"\n'
    )
    python.chmod(0o755)
    # The stand-in takes any number of requests at a time, so none waits in the queue.
    engine = {"engine": "vllm", "engine_args": {"max_num_seqs": 100_000}}
    available = {_MODEL: {"path": "bench/stand-in", **engine}}
    available |= {f"model-{number}": {"path": f"bench/other-{number}", **engine} for number in range(models - 1)}
    content: dict[str, Any] = {
        "server": {"host": "127.0.0.1", "port": port, "workers": workers, "run_dir": str(home / "run")},
        "auth": {"api_keys": [{"key": KEY, "name": "bench", "permissions": ["all"], **_LIMITS}]},
        "logging": {"path": str(home / "logs"), "console": False},
        "engines": {"vllm": {"python": str(python), "zygote": False}},
        "storage": {"url": f"sqlite:///{home / 'bench.db'}"},
        "models": {"default": _MODEL, "available": available},
    }
    path = home / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def fill_store(config: Path, keys: list[str]) -> None:
    """Create keys with every limit in the store of a configuration."""
    database = Database(yaml.safe_load(config.read_text())["storage"]["url"])
    Keys(database).create(KeyFields(name="first", permissions=["all"], **cast("Any", _LIMITS)), Actor("bench"))
    with database.writing() as connection:
        first = dict(connection.execute(KEYS.select()).mappings().one())
        rows = [first | {"id": f"key_{number:016x}", "name": f"k{number}"} for number in range(len(keys))]
        connection.execute(KEYS.insert(), rows)
        digests = [{"digest": digest(key), "key_id": row["id"]} for key, row in zip(keys, rows, strict=True)]
        connection.execute(DIGESTS.insert(), digests)
    database.close()


@contextlib.contextmanager
def vllm_router(target: Engine, folder: Path) -> Iterator[Running]:
    with _rust_router("vllm-router", ["vllm-router"], target, folder) as running:
        yield running


@contextlib.contextmanager
def sglang_router(target: Engine, folder: Path) -> Iterator[Running]:
    with _rust_router("sglang-router", ["python", "-m", "sglang_router.launch_router"], target, folder) as running:
        yield running


@contextlib.contextmanager
def _rust_router(name: str, command: list[str], target: Engine, folder: Path) -> Iterator[Running]:
    port = free_port()
    program = install(name) / "bin" / command[0]
    argv = [str(program), *command[1:], "--host", "127.0.0.1", "--port", str(port)]
    argv += ["--worker-urls", f"http://127.0.0.1:{target.port}", "--policy", "round_robin", "--log-level", "error"]
    argv += ["--prometheus-port", str(free_port()), "--prometheus-host", "127.0.0.1"]
    with started(argv, GATEWAY_CORE, folder=folder, log=f"{name}.log") as pid:
        ask = json.dumps({"model": _MODEL, "messages": [{"role": "user", "content": "hi"}]}).encode()
        wait_answer(port, "/v1/chat/completions", pid=pid, headers={"content-type": "application/json"}, body=ask)
        yield Running(port, pid)


@contextlib.contextmanager
def litellm(target: Engine, folder: Path) -> Iterator[Running]:
    port = free_port()
    model = {"model": f"openai/{_MODEL}", "api_base": f"http://127.0.0.1:{target.port}/v1", "api_key": "none"}
    config = {
        "model_list": [{"model_name": _MODEL, "litellm_params": model}],
        "litellm_settings": {"drop_params": False},
        "general_settings": {"master_key": KEY},
    }
    (folder / "litellm.yaml").write_text(yaml.safe_dump(config))
    argv = [str(install("litellm") / "bin" / "litellm"), "--config", str(folder / "litellm.yaml")]
    argv += ["--host", "127.0.0.1", "--port", str(port), "--num_workers", "1", "--telemetry", "False"]
    env = {"LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MODE": "PRODUCTION"}
    with started(argv, GATEWAY_CORE, folder=folder, log="litellm.log", env=env) as pid:
        ask = json.dumps({"model": _MODEL, "messages": [{"role": "user", "content": "hi"}]}).encode()
        headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
        wait_answer(port, "/v1/chat/completions", pid=pid, headers=headers, body=ask)
        yield Running(port, pid)


Contender = Callable[[Engine, Path], contextlib.AbstractContextManager[Running]]
#: Contenders in the order of a round.
CONTENDERS: dict[str, Contender] = {
    "direct": direct,
    "nginx": nginx,
    "ours": ours,
    "vllm-router": vllm_router,
    "sglang-router": sglang_router,
    "litellm": litellm,
}


class NotInstalled(Exception):
    """A program is missing; the message says how to install it."""


def install(name: str) -> Path:
    """Return the environment of a peer; create it on first use."""
    home = CACHE / "peers" / name
    mark = home / f".{PEERS[name].replace('/', '-')}"
    if not mark.exists():
        print(f"installing {PEERS[name]} ...", flush=True)
        venv.create(home, clear=True, symlinks=True, with_pip=True)
        subprocess.run(
            [str(home / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check", PEERS[name]],
            check=True,
        )
        mark.touch()
    return home


def _is_of_manager(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        line = process.cmdline()
        return "llm_api_server.manager.main" in line or any(word.endswith("guard.py") for word in line)
    return False

"""The commands: what they print, their exit codes, and that errors are sentences. Starting servers is in tests/e2e."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from llm_api_server import __version__
from llm_api_server.cli.main import app
from llm_api_server.config.load import load_config
from llm_api_server.downloads.starter import StarterError
from llm_api_server.ipc import messages
from llm_api_server.ipc.framing import encode
from llm_api_server.ipc.messages import ListModels, LoadModel, Models, PinModel, Refused, Shutdown, UnloadModel
from llm_api_server.ipc.model_status import ModelStatus
from llm_api_server.serving import first_run
from llm_api_server.types import ModelState

CONFIG = """
server: {run_dir: run, port: 1}
auth: {api_keys: [{key: sk-0123456789abcdef, name: me}]}
models: {available: {good: {path: a.gguf, aliases: [fine], adapters: {tuned: lora}}, bad: {path: b.gguf}}}
"""
Run = Callable[..., Result]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder: Path) -> Run:
    def invoke(*words: str) -> Result:
        return CliRunner().invoke(app, list(words))

    return invoke


class TinyManager(threading.Thread):
    """Answers commands on the control socket; the model `bad` fails to load."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        self.received: list[object] = []
        self.twins: list[ModelStatus] = []
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()

    def run(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                decoder = messages.to_manager_decoder()
                for message in decoder.feed(connection.recv(65536)):
                    self.received.append(message)
                    connection.sendall(encode(self._answer(message)))

    def _answer(self, message: object) -> Models | Refused:
        assert isinstance(message, ListModels | LoadModel | UnloadModel | PinModel | Shutdown)
        state = {LoadModel: ModelState.READY, UnloadModel: ModelState.STOPPED}.get(type(message), ModelState.STOPPED)
        good = ModelStatus(
            "good", state, "llama_cpp", "a.gguf", aliases=["fine"], adapters=["tuned"], memory_bytes=300 * 1024 * 1024
        )
        bad = ModelStatus("bad", ModelState.FAILED, "llama_cpp", "b.gguf", error="no such\nfile", retry_at=0.0)
        twins = [] if isinstance(message, UnloadModel) else self.twins
        return Models([good, bad, *twins], request=message.request)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self.join()


@pytest.fixture
def manager(folder: Path) -> Iterator[TinyManager]:
    server = TinyManager(folder / "run" / "manager.sock")
    server.start()
    yield server
    server.close()


# ── configuration ────────────────────────────────────────────────────────────────────────────────────────────────


def test_check_config_says_ok_and_warns(run: Run, folder: Path) -> None:
    result = run("check-config")
    assert result.exit_code == 0
    assert result.stdout == f"{folder / 'config.yaml'}: ok\n"
    assert "warning: The model 'good' cannot be loaded" in result.stderr


COMMANDS = ["check-config", "serve", "stop", "models list", "models show x", "models load x", "models unload x"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_a_bad_file_with_code_2(run: Run, folder: Path, command: str) -> None:
    (folder / "other.yaml").write_text("server: {prot: 1}\nmodels: {default: x}\n")
    result = run(*command.split(), "--config", "other.yaml")
    assert result.exit_code == 2
    assert "other.yaml:1: server.prot: unknown key; did you mean 'port'?" in result.stderr
    assert "models.default" in result.stderr
    assert "Traceback" not in result.output
    assert not (folder / "run").exists()


def test_serve_checks_its_options_like_the_file(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONFIG", "PORT", "WORKERS"):
        monkeypatch.setenv(f"LLM_API_SERVER_{name}", "")  # restored afterwards
    result = run("serve", "--port", "99999", "--workers", "0")
    assert result.exit_code == 2
    assert "LLM_API_SERVER_PORT: server.port: must be at most 65535" in result.stderr
    assert "LLM_API_SERVER_WORKERS: server.workers: must be at least 1" in result.stderr


def test_the_generated_texts_are_printed(run: Run) -> None:
    assert yaml.safe_load(run("config", "example").stdout)["server"]["port"] == 8050
    assert "properties" in json.loads(run("config", "schema").stdout)
    assert run("version").stdout.strip() == __version__


def test_a_new_key_comes_with_the_line_that_admits_it(run: Run, folder: Path) -> None:
    result = run("keys", "new")
    key = re.search(r"key: +(sk-\S+)", result.stdout)
    line = re.search(r"config: +(- .*)", result.stdout)
    assert key is not None
    assert line is not None
    (entry,) = yaml.safe_load(line[1])
    assert entry["key"] == "sha256:" + hashlib.sha256(key[1].encode()).hexdigest()
    text = yaml.safe_dump({"auth": {"api_keys": [entry]}})
    (folder / "new.yaml").write_text(text)
    assert load_config(folder / "new.yaml").auth.api_keys[0].is_hashed


# ── init ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where the starter model was asked for; nothing is fetched."""
    calls: list[Path] = []

    def fetch(models_dir: Path, _progress: object) -> Path:
        calls.append(models_dir)
        return models_dir / "model.gguf"

    monkeypatch.setattr(first_run, "ensure_starter", fetch)
    return calls


def test_init_writes_a_private_file_with_a_key_of_its_own(run: Run, folder: Path, fetched: list[Path]) -> None:
    paths = [folder / "one" / "config.yaml", folder / "two" / "config.yaml"]
    for path in paths:
        assert run("init", "--config", str(path)).exit_code == 0
        assert path.stat().st_mode & 0o777 == 0o600
    one, two = (load_config(path) for path in paths)
    assert one.auth.api_keys[0].key != two.auth.api_keys[0].key
    assert len(one.auth.api_keys[0].key) == 46
    assert one.models.default == "SmolLM2-135M-Instruct"
    assert fetched == [path.parent / "models" for path in paths]
    assert one.models_dir == fetched[0]


def test_init_leaves_a_file_alone_and_fetches_only_what_it_names(run: Run, folder: Path, fetched: list[Path]) -> None:
    result = run("init")
    assert result.exit_code == 0
    assert "left as it is" in result.stdout
    assert (folder / "config.yaml").read_text() == CONFIG
    assert fetched == []
    (folder / "config.yaml").unlink()
    run("init")
    run("init")
    assert fetched == [folder / "models"] * 2, "the model was missing again the second time"


def test_init_without_a_starter_fetches_nothing(run: Run, folder: Path, fetched: list[Path]) -> None:
    assert run("init", "--no-starter", "--config", "new.yaml").exit_code == 0
    assert load_config(folder / "new.yaml").models.available == {}
    assert fetched == []


def test_init_that_cannot_fetch_writes_nothing(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Path:
        raise StarterError("no network; check the connection")

    monkeypatch.setattr(first_run, "ensure_starter", fail)
    result = run("init", "--config", "new.yaml")
    assert (result.exit_code, result.stderr) == (1, "no network; check the connection\n")
    assert not (folder / "new.yaml").exists()


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("command", ["stop", "models list", "models show good", "models load good", "models unload a"])
def test_without_a_server_the_code_is_3_and_the_next_step_is_named(run: Run, command: str) -> None:
    result = run(*command.split())
    assert result.exit_code == 3
    assert "llm-api-server serve" in result.stderr


def test_models_are_listed_with_the_reason_of_failures(run: Run, manager: TinyManager) -> None:
    result = run("models", "list")
    assert result.exit_code == 0
    header, good, bad, _, reason = result.stdout.splitlines()
    assert header.split()[:3] == ["MODEL", "STATE", "ENGINE"]
    assert good.split()[:2] == ["good", "stopped"]
    assert "300 MiB" in good
    assert bad.split()[:2] == ["bad", "failed"]
    assert reason.startswith("bad: no such\\nfile (a request after ")


def test_models_are_listed_as_json(run: Run, manager: TinyManager) -> None:
    listed = json.loads(run("models", "list", "--json").stdout)
    assert [(model["id"], model["state"]) for model in listed] == [("good", "stopped"), ("bad", "failed")]
    assert json.loads(run("models", "show", "bad", "--json").stdout)["error"] == "no such\nfile"


@pytest.mark.parametrize("name", ["good", "fine", "tuned"])
def test_a_model_is_shown_by_name_alias_or_adapter(run: Run, manager: TinyManager, name: str) -> None:
    shown = run("models", "show", name).stdout
    assert re.search(r"^id +good$", shown, re.MULTILINE)
    assert re.search(r"^adapters +.*tuned", shown, re.MULTILINE)
    assert "error" not in shown


def test_models_are_loaded_and_unloaded(run: Run, manager: TinyManager) -> None:
    assert run("models", "load", "fine").stdout == "good: ready\n"
    assert run("models", "unload", "good").stdout == "good: stopped\n"
    commands = [m for m in manager.received if not isinstance(m, ListModels)]
    assert [(type(m), m.model) for m in commands if isinstance(m, LoadModel | UnloadModel)] == [
        (LoadModel, "good"),
        (UnloadModel, "good"),
    ]


def test_models_are_pinned_and_unpinned(run: Run, manager: TinyManager) -> None:
    assert run("models", "pin", "fine").stdout == "good: pinned\n"
    assert run("models", "unpin", "good").stdout == "good: not pinned\n"
    pins = [message for message in manager.received if isinstance(message, PinModel)]
    assert [(message.model, message.is_pinned) for message in pins] == [("good", True), ("good", False)]


def test_a_twin_is_listed_and_unloaded_by_its_name(run: Run, manager: TinyManager) -> None:
    name = "good (embeddings)"
    manager.twins = [ModelStatus(name, ModelState.READY, "vllm", "a", tasks=("embed", "rank"), twin_of="good")]
    assert name in run("models", "list").stdout
    assert re.search(r"^tasks +embed, rank$", run("models", "show", name).stdout, re.MULTILINE)
    assert run("models", "unload", name).stdout == f"{name}: stopped\n"
    assert UnloadModel(1, name) in manager.received


def test_a_failed_load_is_an_error_with_its_reason(run: Run, manager: TinyManager) -> None:
    result = run("models", "load", "bad")
    assert result.exit_code == 1
    assert "bad could not be loaded: no such" in result.stderr


@pytest.mark.parametrize("verb", ["show", "load", "unload"])
def test_an_unknown_model_is_an_error_that_names_the_known(run: Run, manager: TinyManager, verb: str) -> None:
    result = run("models", verb, "none")
    assert result.exit_code == 1
    assert "no model 'none'. Models: good, bad." in result.stderr


def test_stop_ends_a_manager_that_runs_alone(run: Run, manager: TinyManager) -> None:
    result = run("stop")
    assert (result.exit_code, result.stdout) == (0, "Stopped.\n")
    assert manager.received == [Shutdown(1)]


def test_help_needs_none_of_the_heavy_modules() -> None:
    program = """
import sys
from llm_api_server.cli.main import main
try:
    main(["--help"])
except SystemExit as end:
    assert end.code == 0
heavy = {"pydantic", "fastapi", "uvicorn", "loguru", "msgspec", "yaml"} & set(sys.modules)
assert not heavy, heavy
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "check-config" in result.stdout

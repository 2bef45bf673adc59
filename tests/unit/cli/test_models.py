"""`models …` against a manager that responds as the test wants. Real managers are in tests/e2e."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_api_server.cli.models import explanation_text
from llm_api_server.ipc import messages
from llm_api_server.ipc.framing import encode
from llm_api_server.ipc.messages import ListModels, LoadModel, Models, PinModel, Shutdown, UnloadModel
from llm_api_server.ipc.model_status import DeviceStatus, Explanation, ModelStatus
from llm_api_server.types import ModelState
from tests.unit.cli.conftest import Run


class TinyManager(threading.Thread):
    """Responds to commands on the control socket; the model `bad` fails to load."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        self.received: list[object] = []
        self.embedding_instances: list[ModelStatus] = []
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
                    connection.sendall(encode(self._respond(message)))

    def _respond(self, message: object) -> Models:
        assert isinstance(message, ListModels | LoadModel | UnloadModel | PinModel | Shutdown)
        state = ModelState.READY if isinstance(message, LoadModel) else ModelState.STOPPED
        good = ModelStatus(
            "good", state, "llama_cpp", "a.gguf", aliases=["fine"], adapters=["tuned"], memory_bytes=300 * 1024 * 1024
        )
        bad = ModelStatus("bad", ModelState.FAILED, "llama_cpp", "b.gguf", error="no such\nfile", retry_at=0.0)
        others = [] if isinstance(message, UnloadModel) else self.embedding_instances
        return Models([good, bad, *others], request=message.request)

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


def test_models_are_listed_with_the_reason_of_failures(run: Run, manager: TinyManager) -> None:
    header, good, bad, _, reason = run("models", "list").stdout.splitlines()
    assert header.split()[:3] == ["MODEL", "STATE", "ENGINE"]
    assert good.split()[:2] == ["good", "stopped"]
    assert "300 MiB" in good
    assert bad.split()[:2] == ["bad", "failed"]
    assert reason.startswith("bad: no such\\nfile (a request after ")


def test_models_are_listed_and_shown_as_json(run: Run, manager: TinyManager) -> None:
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
    commands = [message for message in manager.received if isinstance(message, LoadModel | UnloadModel)]
    assert [(type(command), command.model) for command in commands] == [(LoadModel, "good"), (UnloadModel, "good")]


def test_models_are_pinned_and_unpinned(run: Run, manager: TinyManager) -> None:
    assert run("models", "pin", "fine").stdout == "good: pinned\n"
    assert run("models", "unpin", "good").stdout == "good: not pinned\n"
    pins = [message for message in manager.received if isinstance(message, PinModel)]
    assert [(message.model, message.is_pinned) for message in pins] == [("good", True), ("good", False)]


def test_an_embedding_instance_is_listed_and_unloaded_by_its_name(run: Run, manager: TinyManager) -> None:
    name = "good (embeddings)"
    instance = ModelStatus(name, ModelState.READY, "vllm", "a", tasks=("embed", "rank"), twin_of="good")
    manager.embedding_instances = [instance]
    assert name in run("models", "list").stdout
    assert re.search(r"^tasks +embed, rank$", run("models", "show", name).stdout, re.MULTILINE)
    assert run("models", "unload", name).stdout == f"{name}: stopped\n"
    assert UnloadModel(1, name) in manager.received


def test_a_failed_load_is_an_error_with_its_reason(run: Run, manager: TinyManager) -> None:
    assert "bad could not be loaded: no such" in run("models", "load", "bad", code=1).stderr


@pytest.mark.parametrize("verb", ["show", "load", "unload", "pin", "explain"])
def test_an_unknown_model_is_an_error_that_lists_the_models(run: Run, manager: TinyManager, verb: str) -> None:
    assert "no model 'none'. Models: good, bad." in run("models", verb, "none", code=1).stderr


def test_stop_ends_a_manager_that_runs_alone(run: Run, manager: TinyManager) -> None:
    assert run("stop").stdout == "Stopped.\n"
    assert manager.received == [Shutdown(1)]


def test_an_explanation_has_the_arithmetic_of_each_device() -> None:
    gib = 1024**3
    explanation = Explanation(
        "m", "never", "It does not fit.", [], "200 GiB", {"gpu0": 200 * gib}, 2, 1,
        [DeviceStatus("gpu0", "H200", 139 * gib, 130 * gib, gib, {"other": 12 * gib}, 117 * gib)],
    )  # fmt: skip
    assert explanation_text(explanation).splitlines() == [
        "m: It does not fit.",
        "It needs 200 GiB.",
        "Models that may be loaded (models.max_loaded): 2, 1 free.",
        "gpu0 (H200): 139.0 GiB in total, 130.0 GiB for models, 12.0 GiB other, 1.0 GiB other programs; 117.0 GiB free",
    ]

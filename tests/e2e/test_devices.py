"""Real models on a machine whose RAM for models is limited: they stay, evict others, or are refused."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.running import BIN, Server, running

SMOL, GEMMA, LARGE = "SmolLM2-135M-Instruct", "gemma-3-270m", "SmolLM2 with a large cache"
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, smollm2_gguf: Path, gemma3_gguf: Path) -> Iterator[Server]:
    """A server with memory for one of two models, and slots for more."""
    models = {
        SMOL: {"path": str(smollm2_gguf), "max_tokens": 512},
        GEMMA: {"path": str(gemma3_gguf), "max_tokens": 512},
        LARGE: {"path": str(smollm2_gguf), "max_tokens": 8192, "aliases": ["large"]},
    }
    config = {"models": {"max_loaded": 5, "available": models, "min_loaded_time": 0}}
    config |= {"devices": {"memory": "700 MiB"}, "inference": {"max_batch_size": 8}}
    with running(tmp_path_factory.mktemp("devices"), config) as server:
        yield server


def complete(server: Server, model: str) -> Any:
    with server.client() as client:
        return client.post("/v1/completions", json={"model": model, "prompt": "Hello", "max_tokens": 2})


def explain(server: Server, model: str) -> dict[str, Any]:
    with server.client() as client:
        explanation: dict[str, Any] = client.get(f"/admin/api/models/{model}/explain").raise_for_status().json()
    return explanation


def command(server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    words = [str(BIN / "llm-api-server"), "models", *arguments, "--config", str(server.folder / "config.yaml")]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.story
def test_two_models_that_do_not_fit_together_swap(server: Server) -> None:
    for model in (SMOL, GEMMA, SMOL):
        assert complete(server, model).status_code == 200
        states = {name: status["state"] for name, status in server.models().items() if name != LARGE}
        assert states == {model: "ready", (GEMMA if model == SMOL else SMOL): "stopped"}
        taken = server.models()[model]["devices"]["ram"]
        assert 350 * MIB < taken <= 700 * MIB


@pytest.mark.story
def test_explanations_predict_evictions(server: Server) -> None:
    assert complete(server, SMOL).status_code == 200
    loaded, other = explain(server, SMOL), explain(server, GEMMA)
    assert loaded["verdict"] == "loaded"
    assert (other["verdict"], other["evict"]) == ("after_evicting", [SMOL])
    (device,) = other["devices"]
    assert (device["id"], device["limit"], device["taken"]) == ("ram", 700 * MIB, {SMOL: loaded["takes"]["ram"]})
    assert device["free"] == 700 * MIB - loaded["takes"]["ram"]
    assert complete(server, GEMMA).status_code == 200
    assert explain(server, SMOL)["evict"] == [GEMMA]


def test_model_that_can_never_fit_is_refused_with_numbers_and_evicts_nothing(server: Server) -> None:
    assert complete(server, SMOL).status_code == 200
    response = complete(server, LARGE)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "model_load_failed")
    assert response.headers["x-should-retry"] == "false"
    message = response.json()["error"]["message"]
    assert "not enough memory: it needs 1." in message
    assert "of cache for 8 requests of 8192 tokens" in message
    assert "700 MiB of RAM for models" in message
    assert server.models()[SMOL]["state"] == "ready"
    assert explain(server, "large")["verdict"] == "never"


def test_command_line_explains_placement(server: Server) -> None:
    assert complete(server, SMOL).status_code == 200
    shown = command(server, "explain", GEMMA)
    assert shown.returncode == 0, shown.stderr
    assert f"after evicting {SMOL}" in shown.stdout
    assert "700 MiB for models" in shown.stdout
    as_json = json.loads(command(server, "explain", "large", "--json").stdout)
    assert (as_json["model"], as_json["verdict"]) == (LARGE, "never")
    missing = command(server, "explain", "nosuch")
    assert missing.returncode != 0
    assert "There is no model 'nosuch'" in missing.stderr


def test_explanation_of_an_unknown_model_is_404(server: Server) -> None:
    with server.client() as client:
        assert client.get("/admin/api/models/nosuch/explain").status_code == 404

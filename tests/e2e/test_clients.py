"""Clients that docs/clients.md describes, each as its users run it: own environment, own process, real server."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import needs
from tests.running import KEY, ROOT, Server, running
from tests.waiting import wait_until

pytestmark = [pytest.mark.clients, pytest.mark.timeout(300)]

MODEL = "SmolLM2-135M-Instruct"
CLIENTS = ROOT / ".venv-clients" / "bin"
SCRIPTS = ROOT / "tests" / "clients"
PAGE = ROOT / "docs" / "clients.md"
READ_FILE: Any = {
    "type": "function",
    "function": {
        "name": "read_file",
        "description": "Read a file",
        "parameters": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
    },
}
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def clients() -> Path:
    """Return the folder of the clients' programs."""
    if not (CLIENTS.parent / ".installed").exists():
        needs.missing("clients", ".venv-clients is missing: run `make test-clients`")
    return CLIENTS


@pytest.fixture(scope="module")
def server(clients: Path, tmp_path_factory: pytest.TempPathFactory, smollm2_gguf: Path) -> Iterator[Server]:
    available = {MODEL: {"path": str(smollm2_gguf), "max_tokens": 4096}}
    config = {"models": {"default": MODEL, "preload": [MODEL], "available": available}}
    with running(tmp_path_factory.mktemp("server"), config) as server:
        wait_until(lambda: server.models()[MODEL]["state"] == "ready")
        yield server


@pytest.fixture
def environment(server: Server, tmp_path: Path) -> dict[str, str]:
    """Return the environment of a user's shell, with the variables that point clients to the server."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "OPENAI_BASE_URL": f"{server.url}/v1",
        "OPENAI_API_KEY": KEY,
        "ANTHROPIC_BASE_URL": server.url,
        "ANTHROPIC_API_KEY": KEY,
        "TEST_URL": server.url,
        "TEST_KEY": KEY,
        "TEST_MODEL": MODEL,
    }


def python(clients: Path, environment: dict[str, str], *words: str) -> str:
    command = [str(clients / "python"), *words]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def facts_of(name: str, clients: Path, environment: dict[str, str], server: Server) -> dict[str, Any]:
    """Run the script and return its findings; wait until the ledger has the stream that it left at the end."""
    facts: dict[str, Any] = json.loads(python(clients, environment, str(SCRIPTS / f"try_{name}.py")))

    def newest_error() -> str | None:
        rows = client.get("/admin/api/requests", params={"limit": 1}).json()["data"]
        return str(rows[0]["error"]) if rows else None

    with server.client() as client:
        wait_until(lambda: newest_error() == "client_closed_request")
    return facts


def test_openai(clients: Path, environment: dict[str, str], server: Server) -> None:
    facts = facts_of("openai", clients, environment, server)
    assert facts["models"] == [MODEL]
    assert facts["chat"]
    assert facts["stream"]
    assert facts["stream_tokens"] <= 8
    assert facts["tool"] == "get_weather"
    assert facts["dimensions"] == [576, 576]
    assert facts["response"]
    assert facts["wrong_key"] == "AuthenticationError"
    assert facts["unknown_model"] == "NotFoundError"


def test_anthropic(clients: Path, environment: dict[str, str], server: Server) -> None:
    facts = facts_of("anthropic", clients, environment, server)
    assert facts["models"] == [MODEL]
    assert facts["chat"]
    assert facts["stream"]
    assert facts["output_tokens"] <= 8
    for name in ("stop_reason", "offered_tools", "after_a_call"):
        assert facts[name] in {"end_turn", "max_tokens", "tool_use"}
    assert facts["counted"] > 0
    assert facts["emoji"] == ["assistant", True]
    assert facts["bearer"] == "none"
    assert facts["wrong_key"] == "AuthenticationError"
    assert facts["unknown_model"] == "NotFoundError"


def test_langchain(clients: Path, environment: dict[str, str], server: Server) -> None:
    facts = facts_of("langchain", clients, environment, server)
    for name in ("chat", "stream", "responses", "anthropic_chat", "anthropic_stream"):
        assert facts[name], name
    assert facts["stream_tokens"] <= 8
    assert facts["tool"] == facts["streamed_tool"] == ["GetWeather"]
    assert facts["form"] in {"Paris", "Rome"}
    assert facts["anthropic_tools"] in {"end_turn", "max_tokens", "tool_use"}
    assert facts["dimensions"] == [576, 576]
    # Classes of LangChain's own, made from the SDKs'.
    assert facts["wrong_key"] == "OpenAIAuthenticationError"
    assert facts["unknown_model"] == "OpenAIModelNotFoundError"
    assert facts["anthropic_wrong_key"] == "AnthropicAuthenticationError"
    assert facts["anthropic_unknown_model"] == "AnthropicModelNotFoundError"


def test_llama_index(clients: Path, environment: dict[str, str], server: Server) -> None:
    facts = facts_of("llama_index", clients, environment, server)
    for name in ("chat", "stream", "completion"):
        assert facts[name], name
    assert facts["tool"] == ["get_weather"]
    assert facts["dimensions"] == [576, 576]
    assert facts["wrong_key"] == "AuthenticationError"
    assert facts["unknown_model"] == "NotFoundError"


class TestLlm:
    """Simon Willison's command line tool."""

    @pytest.fixture
    def shell(self, server: Server, environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
        entry = {"model_name": MODEL, "api_base": f"{server.url}/v1", "api_key_name": "local", "supports_tools": True}
        names = {"smol": MODEL, "nope": "nope"}
        entries = [{**entry, "model_id": name, "model_name": of} for name, of in names.items()]
        (tmp_path / "extra-openai-models.yaml").write_text(yaml.safe_dump(entries), encoding="utf-8")
        return {**environment, "LLM_USER_PATH": str(tmp_path)}

    def llm(self, clients: Path, shell: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
        command = [str(clients / "llm"), *words]
        return subprocess.run(
            command, env=shell, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False
        )

    def test_prompts(self, clients: Path, shell: dict[str, str]) -> None:
        assert self.llm(clients, shell, "keys", "set", "local", "--value", KEY).returncode == 0
        assert "smol" in self.llm(clients, shell, "models").stdout
        for options in ([], ["--no-stream"], ["-T", "llm_version"]):
            response = self.llm(clients, shell, "-m", "smol", "-o", "max_tokens", "8", *options, "Say hello")
            assert response.returncode == 0, response.stderr
            assert response.stdout.strip()
        wrong_model = self.llm(clients, shell, "-m", "nope", "Say hello")
        assert wrong_model.returncode != 0
        assert "model_not_found" in wrong_model.stderr
        wrong_key = self.llm(clients, shell, "-m", "smol", "--key", "sk-wrong", "Say hello")
        assert wrong_key.returncode != 0
        assert "invalid_api_key" in wrong_key.stderr


class TestCodingTools:
    """Requests as tools in editors send them."""

    def test_agent_turn(self, server: Server) -> None:
        """Cline, Roo and Continue's agent: a long system prompt, parts for content, tools, usage at the end."""
        body = {
            "model": MODEL,
            "messages": [
                {"role": "system", "content": "You are a careful programmer. " * 60},
                {"role": "user", "content": [{"type": "text", "text": "<task>Say hello</task>"},
                                             {"type": "text", "text": "<environment_details/>"}]},
                {"role": "assistant", "content": None, "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "read_file", "arguments": '{"path":"a"}'}}]},
                {"role": "tool", "tool_call_id": "c1", "content": "hello"},
            ],
            "temperature": 0, "max_tokens": 8, "stream": True, "stream_options": {"include_usage": True},
            "tools": [READ_FILE], "tool_choice": "auto", "parallel_tool_calls": False,
        }  # fmt: skip
        with server.client() as client:
            text = client.post("/v1/chat/completions", json=body).raise_for_status().text
        events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
        assert events.pop() == "[DONE]"
        chunks = [json.loads(event) for event in events]
        assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["prompt_tokens"] > 300

    def test_autocomplete(self, server: Server) -> None:
        """Continue's `autocomplete` writes the model's own marks into a plain prompt."""
        body = {
            "model": MODEL, "prompt": "<fim_prefix>def add(a, b):\n    <fim_suffix>\n<fim_middle>", "stream": True,
            "max_tokens": 8, "temperature": 0.01, "stop": ["<fim_prefix>", "<fim_suffix>", "<fim_middle>", "\n\n"],
        }  # fmt: skip
        with server.client() as client:
            text = client.post("/v1/completions", json=body).raise_for_status().text
        assert text.endswith("data: [DONE]\n\n")

    def test_embeddings_and_models(self, server: Server) -> None:
        """Continue's index sends lists without `encoding_format`; model pickers read /v1/models."""
        with server.client() as client:
            rows = client.post("/v1/embeddings", json={"model": MODEL, "input": ["a", "b"]}).json()["data"]
            models = client.get("/v1/models").json()["data"]
        assert [len(row["embedding"]) for row in rows] == [576, 576]
        assert [model["id"] for model in models] == [MODEL]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=[snippet.split()[1] for snippet in SNIPPETS])
def test_snippet_of_the_documentation_runs(
    snippet: str, clients: Path, environment: dict[str, str], server: Server
) -> None:
    text = snippet.replace("http://localhost:8050", server.url).replace("sk-…", KEY)
    assert text != snippet
    assert python(clients, environment, "-c", text).strip()

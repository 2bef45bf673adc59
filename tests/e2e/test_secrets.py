"""Planted keys and a planted prompt appear nowhere, even at level DEBUG and after failures of all kinds."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.running import BIN, KEYS, TLS, Server, running
from tests.waiting import wait_until

MODEL = "SmolLM2-135M-Instruct"
CONFIG_KEY = "sk-planted-config-7c1e5b9d2f"
SECRET = "planted-signing-secret-" + "3f9a1c7e5b2d8064" * 2
PROMPT = "xylophone-quartz-planted-prompt"
#: The only file that may hold the key.
ALLOWED = {"config.yaml"}


@pytest.fixture
def server(tmp_path: Path, smollm2_gguf: Path) -> Iterator[Server]:
    planted = {"key": CONFIG_KEY, "name": "planted", "requests_per_minute": 30, "tokens_per_day": 100_000}
    config = {
        "auth": {"api_keys": [*KEYS, planted], "secret_key": SECRET},
        "logging": {"level": "DEBUG"},
        "models": {
            "default": MODEL,
            "preload": [MODEL],
            "available": {
                MODEL: {"path": str(smollm2_gguf), "max_tokens": 256},
                "broken": {"path": str(tmp_path / "missing.gguf")},
            },
        },
    }
    with running(tmp_path, config) as one:
        wait_until(lambda: one.models()[MODEL]["state"] == "ready")
        yield one


def command(server: Server, *words: str) -> str:
    done = subprocess.run(
        [BIN / "llm-api-server", *words], cwd=server.folder, capture_output=True, text=True, check=True
    )
    return done.stdout


def use(server: Server, key: str) -> list[str]:
    """Send the prompt in valid and invalid requests of all kinds; return the error responses."""
    message = {"role": "user", "content": PROMPT}
    chat: dict[str, Any] = {"messages": [message], "max_tokens": 4}
    wrong = []
    with server.client(key) as client:
        for path, body in (
            ("/v1/chat/completions", chat),
            ("/v1/completions", {"prompt": PROMPT, "max_tokens": 4}),
            ("/v1/embeddings", {"input": PROMPT}),
            ("/v1/messages", chat),
            ("/v1/tokenize", {"prompt": PROMPT}),
            ("/v1/chat/completions", {**chat, "temperature": "hot"}),
            ("/v1/chat/completions", {**chat, "model": "broken"}),
            ("/v1/chat/completions", {"messages": [{**message, "content": PROMPT * 200}]}),
            ("/v1/chat/completions", {**chat, "response_format": {"type": "json_schema", "json_schema": {}}}),
        ):
            response = client.post(path, json=body)
            if response.status_code != 200:
                wrong.append(response.text)
        wrong.append(client.post("/v1/chat/completions", content=f'{{"messages": "{PROMPT}').text)
        with client.stream("POST", "/v1/chat/completions", json={**chat, "max_tokens": 200, "stream": True}) as stream:
            next(stream.iter_raw())
        token = client.post("/auth/token", json={"permissions": [f"{PROMPT}"]})
        wrong.append(token.text)
        wrong.append(client.get("/v1/models", headers={"Authorization": f"Bearer {key}x"}).text)
        wrong.append(client.get("/v1/models", headers={"Authorization": f"Basic {key}"}).text)
    assert len(wrong) >= 8
    return wrong


def texts(server: Server) -> Iterator[tuple[str, bytes]]:
    """Yield all texts that could hold a secret, by name."""
    for path in server.folder.rglob("*"):
        if path.is_file() and path.name not in ALLOWED:
            yield str(path), path.read_bytes()
    for process in server.processes():
        yield f"command line of {process.pid}", " ".join(process.cmdline()).encode()
        environment = {name: value for name, value in process.environ().items() if name != "PYTEST_CURRENT_TEST"}
        yield f"environment of {process.pid}", json.dumps(environment).encode()
    for socket in (server.run_dir / "engines").glob("*.sock"):
        with httpx.Client(
            transport=httpx.HTTPTransport(uds=str(socket), verify=TLS), base_url="http://engine"
        ) as client:
            yield f"metrics of {socket.name}", client.get("/metrics").content


def test_planted_secrets_appear_nowhere(server: Server) -> None:
    made = json.loads(command(server, "keys", "create", "--name", "made", "--json"))["secret"]
    wait_until(lambda: httpx.get(f"{server.url}/v1/models", headers={"x-api-key": made}, verify=TLS).status_code == 200)
    with server.client() as client:
        response = client.post("/admin/api/keys", json={"name": "made-by-api"}).raise_for_status()
        by_api = response.json()["secret"]
        rotated = client.post(f"/admin/api/keys/{response.json()['id']}/rotate").raise_for_status().json()["secret"]
    token = httpx.post(f"{server.url}/auth/token", headers={"x-api-key": CONFIG_KEY}).json()["access_token"]
    secrets = [CONFIG_KEY, SECRET, made, by_api, rotated, token]
    errors = [text for key in secrets if key != SECRET for text in use(server, key)]
    wait_until(lambda: psutil.Process(server.manager().pid).is_running())
    for secret in secrets:
        assert not [text for text in errors if secret in text]
    with server.client() as client:
        audit = client.get("/admin/api/audit").raise_for_status().text
        usage = client.get("/admin/api/requests").raise_for_status().text
    assert "made-by-api" in audit
    assert MODEL in usage
    texts_by_name = [*texts(server), ("audit", audit.encode()), ("requests", usage.encode())]
    assert len(texts_by_name) > 10
    assert any(b"planted" in content for _, content in texts_by_name), "the logs name the key"
    for needle in (*secrets, PROMPT):
        assert [name for name, content in texts_by_name if needle.encode() in content] == [], needle[:12]

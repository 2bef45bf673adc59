"""Keys and usage by command line and admin API on a running server with two workers: both see the same store."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.running import BIN, RESTRICTED_KEY, Server, environment, running
from tests.waiting import wait_until

MODEL = "SmolLM2-135M-Instruct"
KEYS = "/admin/api/keys"


def command(server: Server, *words: str) -> Any:
    """Return the output of the command, decoded if it is JSON."""
    result = subprocess.run(
        [str(BIN / "llm-api-server"), *words],
        cwd=server.folder, env=environment(LOGNAME="ann"), check=True, capture_output=True, text=True,
    )  # fmt: skip
    return json.loads(result.stdout) if "--json" in words else result.stdout


def names(server: Server) -> set[str]:
    with server.client() as client:
        return {key["name"] for key in client.get(KEYS).raise_for_status().json()["data"]}


def test_commands_and_api_share_one_store(tmp_path: Path) -> None:
    secrets = []
    with running(tmp_path, {"server": {"workers": 2}}) as server, server.client() as client:
        made = command(server, "keys", "create", "--name", "by-command", "--permission", "chat", "--json")
        secrets.append(made.pop("secret"))
        response = client.post(KEYS, json={"name": "by-api", "requests_per_minute": 5})
        secrets.append(response.raise_for_status().json()["secret"])

        assert names(server) == {"all", "restricted", "by-command", "by-api"}
        assert {key["name"] for key in command(server, "keys", "list", "--json")} == names(server)
        assert client.get(f"{KEYS}/by-command").json() == made

        secrets.append(command(server, "keys", "rotate", "by-api", "--overlap", "1h", "-q").strip())
        rotated = client.get(f"{KEYS}/by-api").json()
        assert rotated["hint"] == secrets[-1][-4:]
        secrets.append(client.post(f"{KEYS}/by-command/rotate", json={"overlap": 0}).json()["secret"])
        assert command(server, "keys", "show", "by-command", "--json")["hint"] == secrets[-1][-4:]

        client.patch(f"{KEYS}/by-command", json={"enabled": False}).raise_for_status()
        assert command(server, "keys", "show", "by-command", "--json")["state"] == "disabled"
        command(server, "keys", "revoke", "by-api")
        assert client.get(f"{KEYS}/by-api").json()["state"] == "revoked"
        command(server, "keys", "delete", "by-api")
        assert client.get(f"{KEYS}/by-api").status_code == 404

        entries = client.get("/admin/api/audit").json()["data"]
        assert [(entry["actor"], entry["action"], entry["key_name"]) for entry in reversed(entries)] == [
            ("cli:ann", "create", "by-command"),
            ("all", "create", "by-api"),
            ("cli:ann", "rotate", "by-api"),
            ("all", "rotate", "by-command"),
            ("all", "update", "by-command"),
            ("cli:ann", "revoke", "by-api"),
            ("cli:ann", "delete", "by-api"),
        ]
        assert command(server, "keys", "audit", "--json") == entries
    # The server has ended: the commands work without it, and no secret is anywhere below the folder.
    assert command(server, "keys", "show", "by-command", "--json")["state"] == "disabled"
    assert command(server, "usage") == "No usage is recorded.\n"
    texts = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert not [secret for secret in secrets for text in texts if secret.encode() in text]


@pytest.mark.story
def test_usage_of_real_requests_is_shown_everywhere(tmp_path: Path, smollm2_gguf: Path) -> None:
    models = {"default": MODEL, "available": {MODEL: {"path": str(smollm2_gguf), "max_tokens": 256}}}
    with running(tmp_path, {"server": {"workers": 2}, "models": models}) as server:
        body = {"prompt": "Once", "max_tokens": 4, "ignore_eos": True}
        with server.client() as client, server.client(RESTRICTED_KEY) as other:
            responses = [client.post("/v1/completions", json=body).raise_for_status().json() for _ in range(2)]
            prompt_tokens = sum(response["usage"]["prompt_tokens"] for response in responses)

            def total(path: str = "/admin/api/usage", **params: str) -> Any:
                return client.get(path, params=params).raise_for_status().json()["total"]

            wait_until(lambda: (total() or {}).get("requests") == 2)
            assert total() == total(key="all", model=MODEL, since="1d") == total("/v1/usage", group_by="hour")
            assert (total()["prompt_tokens"], total()["completion_tokens"]) == (prompt_tokens, 8)
            assert other.get("/v1/usage").json() == {"data": [], "total": None}
            rows = client.get("/admin/api/requests").json()["data"]
            assert [(row["key_name"], row["model"], row["status"], row["prompt"]) for row in rows] == [
                ("all", MODEL, 200, None)
            ] * 2
            assert command(server, "usage", "--json")["total"] == total()
            assert rows[0]["request_id"] in command(server, "usage", "--requests", "--csv")

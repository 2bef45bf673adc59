"""Keys by command line and admin API on a running server with two workers: both see the same store."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from tests.running import BIN, Server, environment, running

KEYS = "/admin/api/keys"


def command(server: Server, *words: str) -> Any:
    """What it printed, as JSON where it is that."""
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
        answer = client.post(KEYS, json={"name": "by-api", "requests_per_minute": 5})
        secrets.append(answer.raise_for_status().json()["secret"])

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
    assert command(server, "usage") == "Nothing was used.\n"
    texts = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert not [secret for secret in secrets for text in texts if secret.encode() in text]

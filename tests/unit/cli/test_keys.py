"""`keys` on a real SQLite file, without a server: what the commands print, store and refuse."""

from __future__ import annotations

import getpass
import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm_api_server.auth.access import digest
from llm_api_server.config.load import load_config
from llm_api_server.store.database import Database
from llm_api_server.store.keys import Keys
from tests.unit.cli.conftest import Run


def show(run: Run, key: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("keys", "show", key, "--json").stdout)
    return found


def create(run: Run, *options: str) -> str:
    """Create the key `app` and return its secret."""
    return run("keys", "create", "--name", "app", "-q", *options).stdout.strip()


def find(folder: Path, secret: str) -> Any:
    database = Database(f"sqlite:///{folder / 'llm-api-server.db'}")
    try:
        return Keys(database).find(digest=digest(secret))
    finally:
        database.close()


def test_new_prints_a_key_and_the_line_that_accepts_it(run: Run, folder: Path) -> None:
    result = run("keys", "new")
    key = re.search(r"key: +(sk-\S+)", result.stdout)
    line = re.search(r"config: +(- .*)", result.stdout)
    assert key is not None
    assert line is not None
    (entry,) = yaml.safe_load(line[1])
    assert entry["key"] == "sha256:" + hashlib.sha256(key[1].encode()).hexdigest()
    (folder / "new.yaml").write_text(yaml.safe_dump({"auth": {"api_keys": [entry]}}))
    assert load_config(folder / "new.yaml").auth.api_keys[0].is_hashed


def test_a_secret_is_printed_once_and_stored_nowhere(run: Run, folder: Path) -> None:
    result = run("keys", "create", "--name", "app")
    found = re.search(r"^key: (sk-\S+)$", result.stdout, re.MULTILINE)
    assert found is not None
    assert result.stdout.startswith("Created the key 'app' (key_")
    assert "shown only here" in result.stderr
    assert find(folder, found[1]).name == "app"
    commands = ["list", "list --json", "show app", "show app --json", "audit", "audit --json"]
    assert [words for words in commands if found[1] in run("keys", *words.split()).stdout] == []
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert [file for file in files if found[1].encode() in file.read_bytes()] == []


@pytest.mark.parametrize("words", [["create", "--name", "other"], ["rotate", "app"]])
def test_quiet_prints_only_the_secret(run: Run, folder: Path, words: list[str]) -> None:
    create(run)
    result = run("keys", *words, "-q")
    assert re.fullmatch(r"sk-\S+\n", result.stdout)
    assert result.stderr == ""
    assert find(folder, result.stdout.strip()).name == words[-1]


def test_every_field_has_an_option(run: Run) -> None:
    before = time.time()
    result = run(
        "keys", "create", "--name", "app", "--note", "of Ann",
        "--permission", "chat,embeddings", "--permission", "models", "--model", "qwen-*", "--model", "small",
        "--requests-per-minute", "60", "--tokens-per-minute", "1000",
        "--max-concurrent", "2", "--tokens-per-day", "5000", "--tokens-per-month", "90000", "--priority", "2.5",
        "--priority-class", "batch",
        "--expires", "30d", "--network", "10.0.0.0/8,192.168.0.0/16", "--disabled", "--json",
    )  # fmt: skip
    made = json.loads(result.stdout)
    assert made.pop("secret").endswith(made["hint"])
    assert made == show(run, "app")
    ends_in = made.pop("expires_at") - before
    assert 30 * 86400 <= ends_in <= 30 * 86400 + time.time() - before
    assert made.pop("created_at") >= before
    assert made.pop("id").startswith("key_")
    del made["hint"]
    assert made == {
        "name": "app", "source": "store", "state": "disabled", "note": "of Ann",
        "permissions": ["chat", "embeddings", "models"], "models": ["qwen-*", "small"],
        "requests_per_minute": 60, "tokens_per_minute": 1000, "max_concurrent": 2,
        "tokens_per_day": 5000, "tokens_per_month": 90000, "priority": 2.5,
        "priority_class": "batch",
        "networks": ["10.0.0.0/8", "192.168.0.0/16"], "enabled": False,
        "last_used_at": None, "revoked_at": None, "old_secret_until": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--permission", "chatt"], "permissions: "),
        (["--requests-per-minute", "many"], "requests_per_minute: 'many' is neither a number nor 'none'."),
        (["--tokens-per-day", "0"], "tokens_per_day: "),
        (["--expires", "soon"], "expires: 'soon' is "),
        (["--network", "10.0.0.0/99"], "networks: "),
        (["--priority", "-1"], "priority: "),
    ],
)
def test_an_invalid_value_is_an_error_and_creates_no_key(run: Run, words: list[str], message: str) -> None:
    result = run("keys", "create", "--name", "app", *words, code=2)
    assert result.stderr.startswith(message)
    assert [key["name"] for key in json.loads(run("keys", "list", "--json").stdout)] == ["fixed"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["create", "--name", "app"], "'app'"),
        (["create", "--name", "fixed"], "A key of the configuration has the name 'fixed'"),
        (["update", "app", "--name", "fixed"], "A key of the configuration has the name 'fixed'"),
    ],
)
def test_names_are_unique_among_keys_of_store_and_configuration(run: Run, words: list[str], message: str) -> None:
    create(run)
    assert message in run("keys", *words, code=1).stderr


def test_an_update_changes_only_the_given_fields_and_removes_limits(run: Run) -> None:
    create(
        run, "--note", "x", "--requests-per-minute", "5", "--tokens-per-day", "7", "--expires", "2090-01-31",
        "--network", "10.0.0.0/8", "--model", "a",
    )  # fmt: skip
    before = show(run, "app")
    result = run(
        "keys", "update", "app", "--name", "new", "--note", "", "--requests-per-minute", "none", "--expires", "never",
        "--network", "none", "--disabled", "--json",
    )  # fmt: skip
    changes: dict[str, Any] = {
        "name": "new", "note": None, "requests_per_minute": None, "expires_at": None, "networks": [],
        "enabled": False, "state": "disabled",
    }  # fmt: skip
    assert json.loads(result.stdout) == before | changes == show(run, before["id"])
    assert before["tokens_per_day"] == 7
    assert json.loads(run("keys", "update", "new", "--enabled", "--json").stdout)["state"] == "active"


def test_an_update_without_options_is_refused(run: Run) -> None:
    create(run)
    assert "give at least one option" in run("keys", "update", "app", code=2).stderr


def test_rotation_keeps_the_old_secret_for_the_overlap(run: Run, folder: Path) -> None:
    first = create(run)
    assert "The old secret is valid until " in run("keys", "rotate", "app", "--overlap", "2h").stdout
    assert show(run, "app")["old_secret_until"] == pytest.approx(time.time() + 7200, abs=600)
    assert find(folder, first).name == "app"
    result = run("keys", "rotate", "app", "--overlap", "0", "--json")
    assert find(folder, json.loads(result.stdout)["secret"]).name == "app"


def test_rotation_without_overlap_ends_the_old_secret(run: Run, folder: Path) -> None:
    first = create(run)
    assert "The old secret is no longer valid." in run("keys", "rotate", "app", "--overlap", "0").stdout
    assert find(folder, first) is None


def test_an_invalid_overlap_is_refused(run: Run) -> None:
    create(run)
    assert run("keys", "rotate", "app", "--overlap", "x", code=2).stderr.startswith("--overlap: 'x' is ")


def test_a_revoked_key_stays_revoked_and_a_deleted_one_is_gone(run: Run) -> None:
    create(run)
    assert run("keys", "revoke", "app").stdout.startswith("Revoked the key 'app' (key_")
    assert show(run, "app")["state"] == "revoked"
    assert "revoked" in run("keys", "update", "app", "--enabled", code=1).stderr
    assert run("keys", "delete", "app").stdout.startswith("Deleted the key 'app' (key_")
    assert "There is no key 'app'" in run("keys", "show", "app", code=1).stderr


def test_a_deletion_is_json(run: Run) -> None:
    create(run)
    key_id = show(run, "app")["id"]
    assert json.loads(run("keys", "delete", "app", "--json").stdout) == {"deleted": key_id, "name": "app"}


@pytest.mark.parametrize("words", ["update fixed --note x", "rotate fixed", "revoke fixed", "delete fixed"])
def test_keys_of_the_configuration_are_listed_and_not_changed(run: Run, folder: Path, words: str) -> None:
    listed = json.loads(run("keys", "list", "--json").stdout)
    assert [(key["name"], key["source"]) for key in listed] == [("fixed", "config")]
    assert show(run, "fixed") == listed[0] == show(run, listed[0]["id"])
    message = run("keys", *words.split(), code=1).stderr
    assert f"change it in auth.api_keys of {folder / 'config.yaml'}" in message


def test_the_audit_log_has_every_change_and_its_actor(run: Run) -> None:
    assert run("keys", "audit").stdout == "No changes are recorded.\n"
    create(run, "--requests-per-minute", "5")
    run("keys", "create", "--name", "other")
    run("keys", "update", "app", "--requests-per-minute", "none")
    run("keys", "delete", "app")
    entries = json.loads(run("keys", "audit", "app", "--json").stdout)
    assert [entry["action"] for entry in entries] == ["delete", "update", "create"]
    assert {entry["actor"] for entry in entries} == {f"cli:{getpass.getuser()}"}
    table = run("keys", "audit", "app").stdout.splitlines()
    assert len(table) == 4
    assert table[2].endswith("requests_per_minute: 5 -> none")
    assert "requests_per_minute=5" in table[3]
    assert len(json.loads(run("keys", "audit", "--limit", "1", "--json").stdout)) == 1


def test_tables_contain_no_control_characters(run: Run) -> None:
    create(run, "--note", "two\nlines\x1b[31m")
    header, *lines = run("keys", "list").stdout.splitlines()
    headings = ["NAME", "ID", "ENDS WITH", "STATE", "PERMISSIONS", "MODELS", "EXPIRES", "LAST USED", "SOURCE"]
    assert re.split(r" {2,}", header) == headings
    assert sorted(line.split()[0] for line in lines) == ["app", "fixed"]
    assert r"two\nlines\x1b[31m" in run("keys", "show", "app").stdout

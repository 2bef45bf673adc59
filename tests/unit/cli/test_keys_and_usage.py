"""`keys` and `usage` on a real SQLite file, without a server: what they print, keep and refuse."""

from __future__ import annotations

import csv
import getpass
import io
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from llm_api_server.auth.access import digest
from llm_api_server.cli.main import app
from llm_api_server.ipc.usage_events import Batch, RequestEnded, RequestStarted, Usage
from llm_api_server.store.database import Database
from llm_api_server.store.keys import Keys
from llm_api_server.store.usage import UsageLedger

CONFIG = """
server: {run_dir: run, port: 1}
storage: {url: "sqlite:///keys.db"}
auth: {api_keys: [{key: sk-0123456789abcdef, name: fixed}]}
"""
Run = Callable[..., Result]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder: Path) -> Run:
    def invoke(*words: str, code: int = 0) -> Result:
        result = CliRunner().invoke(app, list(words))
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        return result

    return invoke


def shown(run: Run, key: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("keys", "show", key, "--json").stdout)
    return found


def find(folder: Path, secret: str) -> Any:
    database = Database(f"sqlite:///{folder / 'keys.db'}")
    try:
        return Keys(database).find(digest=digest(secret))
    finally:
        database.close()


# ── making ──


def test_a_secret_is_printed_once_and_kept_nowhere(run: Run, folder: Path) -> None:
    result = run("keys", "create", "--name", "app")
    found = re.search(r"^key: (sk-\S+)$", result.stdout, re.MULTILINE)
    assert found is not None
    assert result.stdout.startswith("Created the key 'app' (key_")
    assert "shown only here" in result.stderr
    assert find(folder, found[1]).name == "app"
    everything = run("keys", "list").stdout + run("keys", "list", "--json").stdout + run("keys", "show", "app").stdout
    everything += run("keys", "audit").stdout + run("keys", "audit", "--json").stdout
    assert found[1] not in everything
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert not [file for file in files if found[1].encode() in file.read_bytes()]


def test_quiet_prints_the_secret_alone(run: Run, folder: Path) -> None:
    for words in (["create", "--name", "app"], ["rotate", "app"]):
        result = run("keys", *words, "-q")
        assert re.fullmatch(r"sk-\S+\n", result.stdout)
        assert result.stderr == ""
        assert find(folder, result.stdout.strip()).name == "app"


def test_every_field_has_an_option(run: Run) -> None:
    before = time.time()
    answer = run(
        "keys", "create", "--name", "app", "--note", "of Ann",
        "--permission", "chat,embeddings", "--permission", "models", "--model", "qwen-*", "--model", "small",
        "--requests-per-minute", "60", "--tokens-per-minute", "1000",
        "--max-concurrent", "2", "--tokens-per-day", "5000", "--tokens-per-month", "90000", "--priority", "2.5",
        "--priority-class", "batch",
        "--expires", "30d", "--network", "10.0.0.0/8,192.168.0.0/16", "--disabled", "--json",
    )  # fmt: skip
    made = json.loads(answer.stdout)
    assert made.pop("secret").endswith(made["hint"])
    assert made == shown(run, "app")
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
        (["--expires", "soon"], "expires: 'soon' is no time"),
        (["--network", "10.0.0.0/99"], "networks: "),
        (["--priority", "-1"], "priority: "),
    ],
)
def test_a_bad_value_is_a_sentence_and_makes_no_key(run: Run, words: list[str], message: str) -> None:
    result = run("keys", "create", "--name", "app", *words, code=2)
    assert result.stderr.startswith(message)
    assert [key["name"] for key in json.loads(run("keys", "list", "--json").stdout)] == ["fixed"]


def test_a_name_is_taken_once_also_by_the_configuration(run: Run) -> None:
    run("keys", "create", "--name", "app")
    assert "'app'" in run("keys", "create", "--name", "app", code=1).stderr
    assert "A key of the configuration has the name 'fixed'" in run("keys", "create", "--name", "fixed", code=1).stderr
    assert "A key of the configuration" in run("keys", "update", "app", "--name", "fixed", code=1).stderr


# ── changing ──


def test_an_update_changes_what_is_given_and_takes_limits_away(run: Run) -> None:
    run(
        "keys", "create", "--name", "app", "--note", "x", "--requests-per-minute", "5", "--tokens-per-day", "7",
        "--expires", "2090-01-31", "--network", "10.0.0.0/8", "--model", "a",
    )  # fmt: skip
    before = shown(run, "app")
    result = run(
        "keys", "update", "app", "--name", "new", "--note", "", "--requests-per-minute", "none", "--expires", "never",
        "--network", "none", "--disabled", "--json",
    )  # fmt: skip
    changes: dict[str, Any] = {
        "name": "new", "note": None, "requests_per_minute": None, "expires_at": None, "networks": [],
        "enabled": False, "state": "disabled",
    }  # fmt: skip
    assert json.loads(result.stdout) == before | changes == shown(run, before["id"])
    assert before["tokens_per_day"] == 7
    assert json.loads(run("keys", "update", "new", "--enabled", "--json").stdout)["state"] == "active"


def test_an_update_of_nothing_is_refused(run: Run) -> None:
    run("keys", "create", "--name", "app")
    assert "give at least one option" in run("keys", "update", "app", code=2).stderr


def test_rotation_keeps_the_old_secret_for_the_overlap(run: Run, folder: Path) -> None:
    first = run("keys", "create", "--name", "app", "-q").stdout.strip()
    result = run("keys", "rotate", "app", "--overlap", "2h")
    assert "The old secret ends at " in result.stdout
    assert shown(run, "app")["old_secret_until"] == pytest.approx(time.time() + 7200, abs=600)
    assert find(folder, first).name == "app"
    result = run("keys", "rotate", "app", "--overlap", "0", "--json")
    assert find(folder, json.loads(result.stdout)["secret"]).name == "app"
    assert "--overlap: 'x' is no duration" in run("keys", "rotate", "app", "--overlap", "x", code=2).stderr


def test_rotation_without_overlap_ends_the_old_secret(run: Run, folder: Path) -> None:
    first = run("keys", "create", "--name", "app", "-q").stdout.strip()
    assert "The old secret has ended." in run("keys", "rotate", "app", "--overlap", "0").stdout
    assert find(folder, first) is None


def test_a_revoked_key_stays_revoked_and_a_deleted_one_is_gone(run: Run) -> None:
    run("keys", "create", "--name", "app")
    assert run("keys", "revoke", "app").stdout.startswith("Revoked the key 'app' (key_")
    assert shown(run, "app")["state"] == "revoked"
    assert "revoked" in run("keys", "update", "app", "--enabled", code=1).stderr
    assert run("keys", "delete", "app").stdout.startswith("Deleted the key 'app' (key_")
    assert "There is no key 'app'" in run("keys", "show", "app", code=1).stderr


@pytest.mark.parametrize("words", ["update fixed --note x", "rotate fixed", "revoke fixed", "delete fixed"])
def test_the_configurations_keys_are_listed_and_not_changed(run: Run, folder: Path, words: str) -> None:
    listed = json.loads(run("keys", "list", "--json").stdout)
    assert [(key["name"], key["source"]) for key in listed] == [("fixed", "config")]
    assert shown(run, "fixed") == listed[0] == shown(run, listed[0]["id"])
    message = run("keys", *words.split(), code=1).stderr
    assert f"change it in auth.api_keys of {folder / 'config.yaml'}" in message


# ── audit ──


def test_the_audit_tells_who_changed_what(run: Run) -> None:
    assert run("keys", "audit").stdout == "No changes are known.\n"
    run("keys", "create", "--name", "app", "--requests-per-minute", "5")
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


# ── tables and failures ──


def test_the_table_shows_what_cannot_break_a_terminal(run: Run) -> None:
    run("keys", "create", "--name", "app", "--note", "two\nlines\x1b[31m")
    header, *lines = run("keys", "list").stdout.splitlines()
    assert header.split() == [
        "NAME",
        "ID",
        "ENDS",
        "WITH",
        "STATE",
        "PERMISSIONS",
        "MODELS",
        "EXPIRES",
        "LAST",
        "USED",
        "SOURCE",
    ]
    assert sorted(line.split()[0] for line in lines) == ["app", "fixed"]
    assert r"two\nlines\x1b[31m" in run("keys", "show", "app").stdout


COMMANDS = [
    "keys list",
    "keys show x",
    "keys create --name x",
    "keys delete x",
    "keys audit",
    "usage",
    "usage --requests",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_database_that_cannot_be_used_is_a_sentence(run: Run, folder: Path, command: str) -> None:
    (folder / "keys.db").write_text("this is no database, " * 100)
    assert "cannot be used" in run(*command.split(), code=1).stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_a_bad_configuration_has_code_2(run: Run, folder: Path, command: str) -> None:
    (folder / "config.yaml").write_text("server: {prot: 1}\n")
    assert "did you mean 'port'?" in run(*command.split(), code=2).stderr
    assert not (folder / "keys.db").exists()


# ── usage ──


@pytest.fixture
def used(run: Run, folder: Path) -> str:
    """The id of the key `=app`, which used the model `m` twice and `n` once; `fixed` used `m` once."""
    key_id: str = json.loads(run("keys", "create", "--name", "=app", "--json").stdout)["id"]
    day = 20_000 * 86400.0
    requests = [
        ("1", key_id, "=app", "m", day),
        ("2", key_id, "=app", "m", day + 86400),
        ("3", key_id, "=app", "n", day),
    ]
    requests.append(("4", "0123456789ab", "fixed", "m", day + 90000))
    started = [
        RequestStarted(row, f"req-{row}", of, name, model, "/v1/x", False, at) for row, of, name, model, at in requests
    ]
    ended = [RequestEnded(row, 200, None, "m-1", Usage(10, 5), 0.1, 0.2, 1.0) for row in "123"]
    ended.append(RequestEnded("4", 500, "engine_error", "m-1", Usage(1), None, None, 2.0))
    database = Database(f"sqlite:///{folder / 'keys.db'}")
    UsageLedger(database).write(Batch(started, [], ended), "w")
    database.close()
    return key_id


def test_nothing_used_is_said(run: Run) -> None:
    assert run("usage").stdout == "Nothing was used.\n"
    assert run("usage", "--requests").stdout == "No requests are kept.\n"
    assert json.loads(run("usage", "--json").stdout) == {"data": [], "total": None}


def test_the_table_has_totals(run: Run, used: str) -> None:
    header, *rows, total = run("usage", "--by", "model,key").stdout.splitlines()
    assert header.split()[:3] == ["KEY", "MODEL", "REQUESTS"]
    assert sorted(row.split()[:3] for row in rows) == [["=app", "m", "2"], ["=app", "n", "1"], ["fixed", "m", "1"]]
    assert total.split()[:7] == ["TOTAL", "4", "1", "0", "31", "0", "15"]


def test_usage_is_picked_by_key_model_and_time(run: Run, used: str) -> None:
    def requests(*words: str) -> Any:
        total = json.loads(run("usage", "--json", *words).stdout)["total"]
        return total and total["requests"]

    assert requests() == 4
    assert requests("--key", used) == requests("--key", "=app") == 3
    assert requests("--key", "fixed") == 1
    assert requests("--model", "m") == 3
    assert requests("--since", "2024-10-05") == 2
    assert requests("--until", "2024-10-05") == 2
    assert requests("--since", "7d") is None


def test_days_and_json(run: Run, used: str) -> None:
    answer = json.loads(run("usage", "--by", "day", "--key", "=app", "--json").stdout)
    assert [(row["day"], row["requests"]) for row in answer["data"]] == [("2024-10-04", 2), ("2024-10-05", 1)]
    assert answer["total"]["prompt_tokens"] == 30
    assert set(answer["data"][0]) - set(answer["total"]) == {"day"}


def test_csv_has_every_column_and_no_formula(run: Run, used: str) -> None:
    rows = list(csv.DictReader(io.StringIO(run("usage", "--by", "key", "--csv").stdout)))
    assert {row["key_name"]: row["completion_tokens"] for row in rows} == {"'=app": "15", "fixed": "0"}
    rows = list(csv.DictReader(io.StringIO(run("usage", "--requests", "--csv", "--limit", "3").stdout)))
    assert [row["request_id"] for row in rows] == ["req-4", "req-3", "req-2"]


def test_single_requests_newest_first(run: Run, used: str) -> None:
    lines = run("usage", "--requests", "--model", "m").stdout.splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["req-4", "req-2", "req-1"]
    assert "engine_error" in lines[1]
    found = json.loads(run("usage", "--requests", "--key", used, "--json").stdout)["data"]
    assert [row["request_id"] for row in found] == ["req-3", "req-2", "req-1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--by", "colour"], "--by: 'colour' cannot be grouped by: give one or several of key, model, day, hour"),
        (["--since", "soon"], "'soon' is no time"),
        (["--csv", "--json"], "not both"),
        (["--requests", "--since", "7d"], "use --limit"),
    ],
)
def test_what_cannot_be_asked_is_refused(run: Run, words: list[str], message: str) -> None:
    assert message in run("usage", *words, code=2).output

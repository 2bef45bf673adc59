"""`usage` on a real SQLite file, without a server: groups, filters, and formats."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from llm_api_server.ipc.usage_events import Batch, RequestEnded, RequestStarted, Usage
from llm_api_server.store.database import Database
from llm_api_server.store.usage import UsageLedger
from tests.unit.cli.conftest import Run

DAY = 20_000 * 86400.0


@pytest.fixture
def key_id(run: Run, folder: Path) -> str:
    """Id of the key `=app`, which used the model `m` twice and `n` once; `fixed` used `m` once."""
    key_id: str = json.loads(run("keys", "create", "--name", "=app", "--json").stdout)["id"]
    requests = [
        ("1", key_id, "=app", "m", DAY),
        ("2", key_id, "=app", "m", DAY + 86400),
        ("3", key_id, "=app", "n", DAY),
        ("4", "0123456789ab", "fixed", "m", DAY + 90000),
    ]
    started = [
        RequestStarted(row, f"req-{row}", of, name, model, "/v1/x", False, at) for row, of, name, model, at in requests
    ]
    ended = [RequestEnded(row, 200, None, "m-1", Usage(10, 5), 0.1, 0.2, 1.0) for row in "123"]
    ended.append(RequestEnded("4", 500, "engine_error", "m-1", Usage(1), None, None, 2.0))
    database = Database(f"sqlite:///{folder / 'llm-api-server.db'}")
    UsageLedger(database).write(Batch(started, [], ended), "w")
    database.close()
    return key_id


def test_an_empty_ledger_has_no_usage(run: Run) -> None:
    assert run("usage").stdout == "No usage is recorded.\n"
    assert run("usage", "--requests").stdout == "No requests are recorded.\n"
    assert json.loads(run("usage", "--json").stdout) == {"data": [], "total": None}


def test_the_table_has_groups_and_totals(run: Run, key_id: str) -> None:
    header, *rows, total = run("usage", "--by", "model,key").stdout.splitlines()
    assert header.split()[:3] == ["KEY", "MODEL", "REQUESTS"]
    assert sorted(row.split()[:3] for row in rows) == [["=app", "m", "2"], ["=app", "n", "1"], ["fixed", "m", "1"]]
    assert total.split()[:7] == ["TOTAL", "4", "1", "0", "31", "0", "15"]


@pytest.mark.parametrize(
    ("options", "requests"),
    [
        ([], 4),
        (["--key", "=app"], 3),
        (["--key", "ID"], 3),
        (["--key", "fixed"], 1),
        (["--model", "m"], 3),
        (["--since", "2024-10-05"], 2),
        (["--until", "2024-10-05"], 2),
        (["--since", "7d"], None),
    ],
)
def test_usage_is_filtered_by_key_model_and_time(
    run: Run, key_id: str, options: list[str], requests: int | None
) -> None:
    words = [key_id if word == "ID" else word for word in options]
    total = json.loads(run("usage", "--json", *words).stdout)["total"]
    assert (total and total["requests"]) == requests


def test_usage_by_day_is_json(run: Run, key_id: str) -> None:
    output = json.loads(run("usage", "--by", "day", "--key", "=app", "--json").stdout)
    assert [(row["day"], row["requests"]) for row in output["data"]] == [("2024-10-04", 2), ("2024-10-05", 1)]
    assert output["total"]["prompt_tokens"] == 30
    assert set(output["data"][0]) - set(output["total"]) == {"day"}


def rows(text: str) -> list[dict[str, Any]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_csv_has_every_column_and_no_formula(run: Run, key_id: str) -> None:
    sums = rows(run("usage", "--by", "key", "--csv").stdout)
    assert {row["key_name"]: row["completion_tokens"] for row in sums} == {"'=app": "15", "fixed": "0"}
    requests = rows(run("usage", "--requests", "--csv", "--limit", "3").stdout)
    assert [row["request_id"] for row in requests] == ["req-4", "req-3", "req-2"]


def test_single_requests_are_listed_newest_first(run: Run, key_id: str) -> None:
    lines = run("usage", "--requests", "--model", "m").stdout.splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["req-4", "req-2", "req-1"]
    assert "engine_error" in lines[1]
    found = json.loads(run("usage", "--requests", "--key", key_id, "--json").stdout)["data"]
    assert [row["request_id"] for row in found] == ["req-3", "req-2", "req-1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--by", "colour"], "--by: 'colour' "),
        (["--since", "soon"], "'soon' is "),
        (["--csv", "--json"], "not both"),
        (["--requests", "--since", "7d"], "use --limit"),
    ],
)
def test_invalid_options_are_refused(run: Run, words: list[str], message: str) -> None:
    assert message in run("usage", *words, code=2).output

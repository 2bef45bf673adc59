"""Routes of usage reports, over a real SQLite file."""

from __future__ import annotations

import csv
import io
from typing import Any

import httpx
import pytest

from llm_api_server.ipc.usage_events import Batch, RequestEnded, RequestStarted, Usage
from llm_api_server.store.database import Database
from llm_api_server.store.usage import UsageLedger
from tests.admin_api import CHAT_KEY, KEYS, create_key, error_message

pytestmark = pytest.mark.anyio

DAY = 20_000 * 86400.0


@pytest.fixture
async def used(client: httpx.AsyncClient, database: Database) -> dict[str, str]:
    """Key ids by name: `=app` has used `m` on two days, and `n`; `chatter` has used `m` once."""
    ids = {"=app": (await create_key(client, name="=app"))["id"]}
    ids["chatter"] = (await client.get(f"{KEYS}/chatter")).json()["id"]
    requests = [("1", "=app", "m", DAY), ("2", "=app", "m", DAY + 86400), ("3", "=app", "n", DAY + 3600)]
    requests.append(("4", "chatter", "m", DAY + 90000))
    started = [
        RequestStarted(row, f"req-{row}", ids[of], of, model, "/v1/x", False, at) for row, of, model, at in requests
    ]
    ended = [RequestEnded(row, 200, None, "m-1", Usage(10, 5, 4, 1), 0.5, 0.25, 1.0) for row in "123"]
    ended.append(RequestEnded("4", 500, "engine_error", "m-1", Usage(1), None, None, 2.0))
    UsageLedger(database).write(Batch(started, [], ended), "w")
    return ids


async def test_usage_is_grouped_and_summed(client: httpx.AsyncClient, used: dict[str, str]) -> None:
    report = (await client.get("/admin/api/usage", params={"group_by": "key,day"})).json()
    groups = {(row["key_name"], row["key_id"], row["day"]): row["requests"] for row in report["data"]}
    assert groups == {
        ("=app", used["=app"], "2024-10-04"): 2,
        ("=app", used["=app"], "2024-10-05"): 1,
        ("chatter", used["chatter"], "2024-10-05"): 1,
    }
    assert report["total"] == {
        "requests": 4, "errors": 1, "aborted": 0, "prompt_tokens": 31, "cached_tokens": 12, "completion_tokens": 15,
        "reasoning_tokens": 3, "seconds": 5.0, "first_token": 0.25, "queued": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("params", "requests"),
    [
        ({}, 4),
        ({"key": "=app"}, 3),
        ({"key": "chatter", "model": "m"}, 1),
        ({"model": "n"}, 1),
        ({"since": "2024-10-05"}, 2),
        ({"until": str(int(DAY) + 3600)}, 1),
        ({"since": "7d"}, None),
    ],
)
async def test_usage_is_filtered(
    client: httpx.AsyncClient, used: dict[str, str], params: dict[str, str], requests: int | None
) -> None:
    report = (await client.get("/admin/api/usage", params={"group_by": "", **params})).raise_for_status().json()
    total = report["total"]
    assert (total and total["requests"]) == requests
    assert report["data"] == ([total] if total else [])


async def test_usage_is_filtered_by_key_id(client: httpx.AsyncClient, used: dict[str, str]) -> None:
    for name, requests in (("=app", 3), ("chatter", 1)):
        report = (await client.get("/admin/api/usage", params={"key": used[name]})).json()
        assert report["total"]["requests"] == requests


@pytest.mark.parametrize("how", [{"params": {"format": "csv"}}, {"headers": {"accept": "text/csv"}}])
@pytest.mark.parametrize("path", ["/admin/api/usage", "/admin/api/requests"])
async def test_csv_contains_no_formulas(
    client: httpx.AsyncClient, used: dict[str, str], path: str, how: dict[str, Any]
) -> None:
    response = await client.get(path, **how)
    assert response.headers["content-type"] == "text/csv; charset=utf-8"
    assert "attachment" in response.headers["content-disposition"]
    rows = list(csv.DictReader(io.StringIO(response.text)))
    assert {row["key_name"] for row in rows} == {"'=app", "chatter"}
    assert sum(int(row["prompt_tokens"]) for row in rows) == 31


async def test_the_format_parameter_overrides_the_header(client: httpx.AsyncClient, used: dict[str, str]) -> None:
    response = await client.get("/admin/api/usage", params={"format": "json"}, headers={"accept": "text/csv"})
    assert response.json()["total"]["requests"] == 4


async def test_a_key_reads_only_its_own_usage(client: httpx.AsyncClient, used: dict[str, str]) -> None:
    headers = {"Authorization": f"Bearer {CHAT_KEY}"}
    for params in ({}, {"key": "=app"}, {"key_id": used["=app"]}):
        report = (await client.get("/v1/usage", params=params, headers=headers)).json()
        assert [(row["model"], row["requests"]) for row in report["data"]] == [("m", 1)]
    assert (await client.get("/v1/usage")).json() == {"data": [], "total": None}
    response = await client.get("/v1/usage", params={"group_by": "key"}, headers=headers)
    assert "model, day, hour" in error_message(response, 400, param="group_by")
    response = await client.get("/v1/usage", params={"group_by": "day,hour", "format": "csv"}, headers=headers)
    assert response.text.splitlines()[1].startswith("2024-10-05,2024-10-05T01:00:00Z,1,")


async def test_single_requests_are_listed_newest_first(client: httpx.AsyncClient, used: dict[str, str]) -> None:
    async def ids(**params: Any) -> list[str]:
        found = (await client.get("/admin/api/requests", params=params)).raise_for_status().json()["data"]
        return [row["request_id"] for row in found]

    assert await ids() == ["req-4", "req-3", "req-2", "req-1"]
    assert await ids(key="=app", model="m") == ["req-2", "req-1"]
    newest = (await client.get("/admin/api/requests", params={"limit": 1})).json()["data"]
    assert await ids(before=newest[0]["id"], limit=2) == ["req-3", "req-2"]
    assert (newest[0]["status"], newest[0]["error"], newest[0]["prompt"]) == (500, "engine_error", None)


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"group_by": "colour"}, "group_by"),
        ({"since": "soon"}, "since"),
        ({"until": "soon"}, "until"),
        ({"format": "xml"}, "format"),
        ({"model": "a\0b"}, "model"),
    ],
)
async def test_an_invalid_query_names_the_parameter(
    client: httpx.AsyncClient, params: dict[str, str], param: str
) -> None:
    for path in ("/admin/api/usage", "/v1/usage"):
        error_message(await client.get(path, params=params), 400, param=param)


async def test_page_limits_are_checked(client: httpx.AsyncClient) -> None:
    for path in ("/admin/api/requests", "/admin/api/audit"):
        for params in ({"limit": 0}, {"limit": 10**6}, {"before": -1}, {"before": 2**70}):
            error_message(await client.get(path, params=params), 400, param=next(iter(params)))

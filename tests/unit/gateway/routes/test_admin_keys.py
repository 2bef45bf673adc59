"""Routes over the store on a real SQLite file: keys, audit, usage; what they answer and refuse."""

from __future__ import annotations

import asyncio
import csv
import io
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from loguru import logger

from llm_api_server.auth.access import digest
from llm_api_server.config.models import ApiKeyConfig, AuthConfig, Config, ServerConfig, StorageConfig
from llm_api_server.gateway.app import build_app
from llm_api_server.gateway.manager_link.leases import Leases
from llm_api_server.gateway.manager_link.link import ManagerLink
from llm_api_server.http_client.client import HttpClient
from llm_api_server.ipc.run_dir import RunDir
from llm_api_server.ipc.usage_events import Batch, RequestEnded, RequestStarted, Usage
from llm_api_server.store.database import Database
from llm_api_server.store.keys import Keys
from llm_api_server.store.usage import UsageLedger

pytestmark = pytest.mark.anyio

KEY = "sk-admin-0123456789abcdef"
CHAT_KEY = "sk-chat-0123456789abcdef"
KEYS = "/admin/api/keys"
DAY = 20_000 * 86400.0


@pytest.fixture
def config(tmp_path: Path) -> Config:
    keys = [
        ApiKeyConfig(key=KEY, name="boss", permissions=["admin"]),
        ApiKeyConfig(key=CHAT_KEY, name="chatter", permissions=["chat"]),
    ]
    return Config(
        server=ServerConfig(cors_origins=["https://console.example"]),
        storage=StorageConfig(url=f"sqlite:///{tmp_path / 'keys.db'}"),
        auth=AuthConfig(api_keys=keys),
    )


@pytest.fixture
def database(config: Config) -> Iterator[Database]:
    one = Database(config.storage_url)
    yield one
    one.close()


@pytest.fixture
async def client(config: Config) -> AsyncIterator[httpx.AsyncClient]:
    with tempfile.TemporaryDirectory(prefix="gw-") as path:
        upstream = HttpClient()
        app = build_app(config, Leases(ManagerLink(RunDir(Path(path)), lambda _: None)), upstream)
        headers = {"Authorization": f"Bearer {KEY}"}
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as one:
            yield one
        upstream.close()


@pytest.fixture
def logged() -> Iterator[list[str]]:
    lines: list[str] = []
    sink = logger.add(lines.append, level="TRACE", format="{message} {exception}")
    yield lines
    logger.remove(sink)


async def make(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await client.post(KEYS, json={"name": "app", **fields})
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


def refused(answer: httpx.Response, status: int, *, param: str | None = None, code: str | None = None) -> str:
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (status, param, code), answer.text
    return str(error["message"])


# ── keys ──


async def test_the_secret_is_answered_once_not_cached_and_not_logged(
    client: httpx.AsyncClient, database: Database, logged: list[str]
) -> None:
    answer = await client.post(KEYS, json={"name": "app"})
    first = answer.json()["secret"]
    assert answer.headers["cache-control"] == "no-store"
    found = Keys(database).find(digest=digest(first))
    assert found is not None
    assert found.key_id == answer.json()["id"]
    answer = await client.post(f"{KEYS}/app/rotate")
    second = answer.json()["secret"]
    assert answer.headers["cache-control"] == "no-store"
    assert second != first
    rest = ""
    for path in (KEYS, f"{KEYS}/app", "/admin/api/audit"):
        rest += (await client.get(path)).raise_for_status().text
    rest += (await client.patch(f"{KEYS}/app", json={"note": "x"})).raise_for_status().text
    rest += (await client.post(f"{KEYS}/app/revoke")).raise_for_status().text
    while "".join(logged).count("POST ") < 3:  # lines of requests are written a moment later
        await asyncio.sleep(0.01)
    rest += "".join(logged)
    for secret in (first, second):
        assert secret not in rest
        assert digest(secret) not in rest


async def test_every_field_is_kept(client: httpx.AsyncClient) -> None:
    fields = {
        "name": "app", "note": "of Ann", "permissions": ["chat"], "models": ["qwen-*"], "requests_per_minute": 1,
        "tokens_per_minute": 2, "max_concurrent": 3, "tokens_per_day": 4, "tokens_per_month": 5, "priority": 2.5,
        "expires_at": 4102444800.0, "networks": ["10.0.0.0/8"], "enabled": False,
    }  # fmt: skip
    made = await make(client, **fields)
    assert made["hint"] == made.pop("secret")[-4:]
    assert fields.items() <= made.items()
    assert (made["source"], made["state"]) == ("store", "disabled")
    for name in (made["id"], "app"):
        assert (await client.get(f"{KEYS}/{name}")).json() == made


async def test_a_change_keeps_what_is_not_given_and_null_takes_away(client: httpx.AsyncClient) -> None:
    made = await make(client, tokens_per_day=5, requests_per_minute=7, expires_at="2090-01-31")
    changes = {"requests_per_minute": None, "expires_at": None, "name": "new", "note": "n"}
    answer = await client.patch(f"{KEYS}/app", json=changes)
    del made["secret"]
    assert answer.json() == made | changes
    assert made["expires_at"] == 3789504000.0


async def test_names_may_hold_slashes(client: httpx.AsyncClient) -> None:
    await make(client, name="team/app")
    assert (await client.get(f"{KEYS}/team/app")).json()["name"] == "team/app"
    assert (await client.post(f"{KEYS}/team/app/revoke")).json()["state"] == "revoked"


async def test_rotation_tells_how_long_the_old_secret_lives(client: httpx.AsyncClient, database: Database) -> None:
    first = (await make(client))["secret"]
    before = time.time()
    answer = await client.post(f"{KEYS}/app/rotate")
    assert before + 86400 <= answer.json()["old_secret_until"] <= time.time() + 86400
    assert Keys(database).find(digest=digest(first)) is not None
    second = answer.json()["secret"]
    await client.post(f"{KEYS}/app/rotate", json={"overlap": 0})
    assert Keys(database).find(digest=digest(second)) is None


async def test_a_deleted_key_is_gone_and_its_audit_stays(client: httpx.AsyncClient) -> None:
    made = await make(client)
    answer = await client.delete(f"{KEYS}/app")
    assert answer.json() == {"id": made["id"], "name": "app", "deleted": True}
    refused(await client.get(f"{KEYS}/app"), 404, code="key_not_found")
    entries = (await client.get("/admin/api/audit", params={"key": "app"})).json()["data"]
    assert [entry["action"] for entry in entries] == ["delete", "create"]


async def test_the_audit_names_the_key_and_the_request(client: httpx.AsyncClient) -> None:
    await client.post(KEYS, json={"name": "app"}, headers={"x-request-id": "req-1"})
    await client.patch(f"{KEYS}/app", json={"note": "x"}, headers={"x-request-id": "req-2"})
    second, first = (await client.get("/admin/api/audit")).json()["data"]
    boss = (await client.get(f"{KEYS}/boss")).json()["id"]
    for entry, request in ((first, "req-1"), (second, "req-2")):
        assert (entry["actor"], entry["actor_key_id"], entry["request_id"]) == ("boss", boss, request)
    assert second["changes"] == {"note": [None, "x"]}
    older = await client.get("/admin/api/audit", params={"before": second["revision"], "limit": 1})
    assert older.json()["data"] == [first]


async def test_the_configurations_keys_are_listed_and_not_changed(client: httpx.AsyncClient) -> None:
    listed = (await client.get(KEYS)).json()["data"]
    assert [(key["name"], key["source"], key["hint"]) for key in listed] == [
        ("boss", "config", None),
        ("chatter", "config", None),
    ]
    for one in ("boss", listed[0]["id"]):
        path = f"{KEYS}/{one}"
        for answer in (
            await client.patch(path, json={"note": "x"}),
            await client.delete(path),
            await client.post(f"{path}/rotate"),
            await client.post(f"{path}/revoke"),
        ):
            assert "change it in auth.api_keys of" in refused(answer, 400)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"permissions": ["chatt"]}, "permissions"),
        ({"requests_per_minute": 0}, "requests_per_minute"),
        ({"requests_per_minute": "many"}, "requests_per_minute"),
        ({"tokens_per_day": 2**60}, "tokens_per_day"),
        ({"networks": ["10.0.0.0/99"]}, "networks"),
        ({"expires_at": "soon"}, "expires_at.str"),
        ({"priority": None}, "priority"),
        ({"name": None}, "name"),
        ({"name": ""}, "name"),
        ({"note": "a\0b"}, "note"),
        ({"colour": "red"}, "colour"),
    ],
)
async def test_bad_values_name_the_field(client: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    param = param.removesuffix(".str")
    assert param in refused(await client.post(KEYS, json={"name": "app", **fields}), 400, param=param)
    refused(await client.get(f"{KEYS}/app"), 404, code="key_not_found")
    await make(client)
    refused(await client.patch(f"{KEYS}/app", json=fields), 400, param=param)


@pytest.mark.parametrize("field", ["name", "note"])
async def test_half_a_character_is_refused(client: httpx.AsyncClient, field: str) -> None:
    body = '{"name": "app", "%s": "\\ud800"}' % field  # noqa: UP031 - braces
    headers = {"content-type": "application/json"}
    answer = await client.post(KEYS, content=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_what_is_not_there_or_not_possible_is_told(client: httpx.AsyncClient) -> None:
    for answer in (
        await client.patch(f"{KEYS}/none", json={}),
        await client.delete(f"{KEYS}/none"),
        await client.post(f"{KEYS}/none/rotate"),
        await client.post(f"{KEYS}/none/revoke"),
        await client.get(f"{KEYS}/a%00b"),
    ):
        refused(answer, 404, code="key_not_found")
    await make(client)
    for name in ("app", "chatter"):
        refused(await client.post(KEYS, json={"name": name}), 409, param="name", code="name_taken")
    await client.post(f"{KEYS}/app/revoke")
    assert "revoked" in refused(await client.patch(f"{KEYS}/app", json={"enabled": True}), 400)
    assert "revoked" in refused(await client.post(f"{KEYS}/app/rotate"), 400)
    refused(await client.post(f"{KEYS}/app/rotate", json={"overlap": -1}), 400, param="overlap")


async def test_browsers_may_change_keys(client: httpx.AsyncClient) -> None:
    for method in ("PATCH", "DELETE"):
        headers = {"Origin": "https://console.example", "Access-Control-Request-Method": method}
        assert (await client.options(f"{KEYS}/app", headers=headers)).status_code == 200


@pytest.mark.parametrize("path", [KEYS, f"{KEYS}/boss", "/admin/api/audit", "/admin/api/usage", "/admin/api/requests"])
async def test_the_admin_api_needs_admin(client: httpx.AsyncClient, path: str) -> None:
    refused(await client.get(path, headers={"Authorization": f"Bearer {CHAT_KEY}"}), 403, code="permission_denied")


async def test_no_key_is_made_without_admin(client: httpx.AsyncClient, database: Database) -> None:
    answer = await client.post(KEYS, json={"name": "app"}, headers={"Authorization": f"Bearer {CHAT_KEY}"})
    refused(answer, 403, code="permission_denied")
    assert Keys(database).list() == []


# ── usage ──


@pytest.fixture
async def used(client: httpx.AsyncClient, database: Database) -> dict[str, str]:
    """Ids by name: `=app` used `m` on two days and `n`; `chatter` used `m` once."""
    ids = {"=app": (await make(client, name="=app"))["id"]}
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


async def test_usage_by_group_with_a_total(client: httpx.AsyncClient, used: dict[str, str]) -> None:
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
async def test_usage_is_picked(
    client: httpx.AsyncClient, used: dict[str, str], params: dict[str, str], requests: int | None
) -> None:
    report = (await client.get("/admin/api/usage", params={"group_by": "", **params})).raise_for_status().json()
    total = report["total"]
    assert (total and total["requests"]) == requests
    assert report["data"] == ([total] if total else [])


async def test_usage_of_an_id(client: httpx.AsyncClient, used: dict[str, str]) -> None:
    for name, requests in (("=app", 3), ("chatter", 1)):
        report = (await client.get("/admin/api/usage", params={"key": used[name]})).json()
        assert report["total"]["requests"] == requests


@pytest.mark.parametrize("how", [{"params": {"format": "csv"}}, {"headers": {"accept": "text/csv"}}])
@pytest.mark.parametrize("path", ["/admin/api/usage", "/admin/api/requests"])
async def test_csv_holds_no_formula(
    client: httpx.AsyncClient, used: dict[str, str], path: str, how: dict[str, Any]
) -> None:
    answer = await client.get(path, **how)
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert "attachment" in answer.headers["content-disposition"]
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert {row["key_name"] for row in rows} == {"'=app", "chatter"}
    assert sum(int(row["prompt_tokens"]) for row in rows) == 31


async def test_a_format_in_the_address_wins(client: httpx.AsyncClient, used: dict[str, str]) -> None:
    answer = await client.get("/admin/api/usage", params={"format": "json"}, headers={"accept": "text/csv"})
    assert answer.json()["total"]["requests"] == 4


async def test_a_key_reads_its_own_usage_only(client: httpx.AsyncClient, used: dict[str, str]) -> None:
    headers = {"Authorization": f"Bearer {CHAT_KEY}"}
    for params in ({}, {"key": "=app"}, {"key_id": used["=app"]}):
        report = (await client.get("/v1/usage", params=params, headers=headers)).json()
        assert [(row["model"], row["requests"]) for row in report["data"]] == [("m", 1)]
    assert (await client.get("/v1/usage")).json() == {"data": [], "total": None}
    answer = await client.get("/v1/usage", params={"group_by": "key"}, headers=headers)
    assert "model, day, hour" in refused(answer, 400, param="group_by")
    answer = await client.get("/v1/usage", params={"group_by": "day,hour", "format": "csv"}, headers=headers)
    assert answer.text.splitlines()[1].startswith("2024-10-05,2024-10-05T01:00:00Z,1,")


async def test_single_requests_newest_first(client: httpx.AsyncClient, used: dict[str, str]) -> None:
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
async def test_what_cannot_be_asked_is_named(client: httpx.AsyncClient, params: dict[str, str], param: str) -> None:
    for path in ("/admin/api/usage", "/v1/usage"):
        refused(await client.get(path, params=params), 400, param=param)


async def test_limits_of_pages_are_checked(client: httpx.AsyncClient) -> None:
    for path in ("/admin/api/requests", "/admin/api/audit"):
        for params in ({"limit": 0}, {"limit": 10**6}, {"before": -1}, {"before": 2**70}):
            refused(await client.get(path, params=params), 400, param=next(iter(params)))


# ── the store itself ──

Ask = Callable[[httpx.AsyncClient], Any]


@pytest.mark.parametrize(
    "ask",
    [
        lambda client: client.get(KEYS),
        lambda client: client.post(KEYS, json={"name": "app"}),
        lambda client: client.get("/v1/usage"),
        lambda client: client.get("/admin/api/requests"),
    ],
)
async def test_a_store_out_of_reach_is_told_and_comes_back(
    client: httpx.AsyncClient, tmp_path: Path, logged: list[str], ask: Ask
) -> None:
    (tmp_path / "keys.db").mkdir()
    answer = await ask(client)
    message = refused(answer, 503, code="store_unavailable")
    assert int(answer.headers["retry-after"]) >= 1
    assert str(tmp_path) not in message
    assert any(str(tmp_path) in line for line in logged)
    (tmp_path / "keys.db").rmdir()
    assert (await ask(client)).status_code in {200, 201}


async def test_nothing_of_sqlalchemy_is_loaded_before_it_is_needed() -> None:
    script = "import sys, llm_api_server.gateway.app; print([m for m in sys.modules if m in ('sqlalchemy', 'alembic')])"
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert found.stdout == "[]\n"


async def test_the_description_has_the_routes_and_their_errors(client: httpx.AsyncClient) -> None:
    paths = (await client.get("/openapi.json")).json()["paths"]
    assert set(paths["/admin/api/keys/{key_id}"]) == {"get", "patch", "delete"}
    for path in (KEYS, "/admin/api/audit", "/admin/api/usage", "/admin/api/requests", "/v1/usage"):
        assert {"200", "400", "401", "403", "503"} <= set(paths[path]["get"]["responses"])
    assert "text/csv" in paths["/v1/usage"]["get"]["responses"]["200"]["content"]

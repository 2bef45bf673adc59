"""Routes of keys and audit, over a real SQLite file."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest

from llm_api_server.auth.access import digest
from llm_api_server.store.database import Database
from llm_api_server.store.keys import Keys
from tests.admin_api import CHAT_KEY, KEYS, create_key, error_message
from tests.waiting import until

pytestmark = pytest.mark.anyio


async def test_a_secret_is_sent_once_and_neither_cached_nor_logged(
    client: httpx.AsyncClient, database: Database, logged: list[str]
) -> None:
    response = await client.post(KEYS, json={"name": "app"})
    first = response.json()["secret"]
    assert response.headers["cache-control"] == "no-store"
    found = Keys(database).find(digest=digest(first))
    assert found is not None
    assert found.key_id == response.json()["id"]
    response = await client.post(f"{KEYS}/app/rotate")
    second = response.json()["secret"]
    assert response.headers["cache-control"] == "no-store"
    assert second != first
    rest = ""
    for path in (KEYS, f"{KEYS}/app", "/admin/api/audit"):
        rest += (await client.get(path)).raise_for_status().text
    rest += (await client.patch(f"{KEYS}/app", json={"note": "x"})).raise_for_status().text
    rest += (await client.post(f"{KEYS}/app/revoke")).raise_for_status().text
    await until(lambda: "".join(logged).count("POST ") == 3)  # access lines are written a moment later
    rest += "".join(logged)
    for secret in (first, second):
        assert secret not in rest
        assert digest(secret) not in rest


async def test_every_field_is_stored(client: httpx.AsyncClient) -> None:
    fields = {
        "name": "app", "note": "of Ann", "permissions": ["chat"], "models": ["qwen-*"], "requests_per_minute": 1,
        "tokens_per_minute": 2, "max_concurrent": 3, "tokens_per_day": 4, "tokens_per_month": 5, "priority": 2.5,
        "expires_at": 4102444800.0, "networks": ["10.0.0.0/8"], "enabled": False,
    }  # fmt: skip
    created = await create_key(client, **fields)
    assert created["hint"] == created.pop("secret")[-4:]
    assert fields.items() <= created.items()
    assert (created["source"], created["state"]) == ("store", "disabled")
    for name in (created["id"], "app"):
        assert (await client.get(f"{KEYS}/{name}")).json() == created


async def test_an_update_keeps_absent_fields_and_null_removes_a_value(client: httpx.AsyncClient) -> None:
    created = await create_key(client, tokens_per_day=5, requests_per_minute=7, expires_at="2090-01-31")
    changes = {"requests_per_minute": None, "expires_at": None, "name": "new", "note": "n"}
    response = await client.patch(f"{KEYS}/app", json=changes)
    del created["secret"]
    assert response.json() == created | changes
    assert created["expires_at"] == 3789504000.0


async def test_names_may_contain_slashes(client: httpx.AsyncClient) -> None:
    await create_key(client, name="team/app")
    assert (await client.get(f"{KEYS}/team/app")).json()["name"] == "team/app"
    assert (await client.post(f"{KEYS}/team/app/revoke")).json()["state"] == "revoked"


async def test_a_rotation_shows_the_end_of_the_old_secret(client: httpx.AsyncClient, database: Database) -> None:
    first = (await create_key(client))["secret"]
    before = time.time()
    response = await client.post(f"{KEYS}/app/rotate")
    assert before + 86400 <= response.json()["old_secret_until"] <= time.time() + 86400
    assert Keys(database).find(digest=digest(first)) is not None
    second = response.json()["secret"]
    await client.post(f"{KEYS}/app/rotate", json={"overlap": 0})
    assert Keys(database).find(digest=digest(second)) is None


async def test_the_audit_of_a_deleted_key_stays(client: httpx.AsyncClient) -> None:
    created = await create_key(client)
    response = await client.delete(f"{KEYS}/app")
    assert response.json() == {"id": created["id"], "name": "app", "deleted": True}
    error_message(await client.get(f"{KEYS}/app"), 404, code="key_not_found")
    entries = (await client.get("/admin/api/audit", params={"key": "app"})).json()["data"]
    assert [entry["action"] for entry in entries] == ["delete", "create"]


async def test_the_audit_names_the_key_and_request_of_a_change(client: httpx.AsyncClient) -> None:
    await client.post(KEYS, json={"name": "app"}, headers={"x-request-id": "req-1"})
    await client.patch(f"{KEYS}/app", json={"note": "x"}, headers={"x-request-id": "req-2"})
    second, first = (await client.get("/admin/api/audit")).json()["data"]
    boss = (await client.get(f"{KEYS}/boss")).json()["id"]
    for entry, request in ((first, "req-1"), (second, "req-2")):
        assert (entry["actor"], entry["actor_key_id"], entry["request_id"]) == ("boss", boss, request)
    assert second["changes"] == {"note": [None, "x"]}
    older = await client.get("/admin/api/audit", params={"before": second["revision"], "limit": 1})
    assert older.json()["data"] == [first]


async def test_configured_keys_are_listed_and_read_only(client: httpx.AsyncClient) -> None:
    listed = (await client.get(KEYS)).json()["data"]
    assert [(key["name"], key["source"], key["hint"]) for key in listed] == [
        ("boss", "config", None),
        ("chatter", "config", None),
    ]
    for name_or_id in ("boss", listed[0]["id"]):
        path = f"{KEYS}/{name_or_id}"
        for response in (
            await client.patch(path, json={"note": "x"}),
            await client.delete(path),
            await client.post(f"{path}/rotate"),
            await client.post(f"{path}/revoke"),
        ):
            assert "change it in auth.api_keys of" in error_message(response, 400)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"permissions": ["chatt"]}, "permissions"),
        ({"requests_per_minute": 0}, "requests_per_minute"),
        ({"requests_per_minute": "many"}, "requests_per_minute"),
        ({"tokens_per_day": 2**60}, "tokens_per_day"),
        ({"networks": ["10.0.0.0/99"]}, "networks"),
        ({"expires_at": "soon"}, "expires_at"),
        ({"priority": None}, "priority"),
        ({"name": None}, "name"),
        ({"name": ""}, "name"),
        ({"note": "a\0b"}, "note"),
        ({"colour": "red"}, "colour"),
    ],
)
async def test_an_invalid_value_names_its_field(client: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    assert param in error_message(await client.post(KEYS, json={"name": "app", **fields}), 400, param=param)
    error_message(await client.get(f"{KEYS}/app"), 404, code="key_not_found")
    await create_key(client)
    error_message(await client.patch(f"{KEYS}/app", json=fields), 400, param=param)


@pytest.mark.parametrize("field", ["name", "note"])
async def test_a_lone_surrogate_is_refused(client: httpx.AsyncClient, field: str) -> None:
    body = '{"name": "app", "%s": "\\ud800"}' % field  # noqa: UP031 - braces
    headers = {"content-type": "application/json"}
    response = await client.post(KEYS, content=body, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("method", "path"),
    [("PATCH", "none"), ("DELETE", "none"), ("POST", "none/rotate"), ("POST", "none/revoke"), ("GET", "a%00b")],
)
async def test_an_unknown_key_is_not_found(client: httpx.AsyncClient, method: str, path: str) -> None:
    response = await client.request(method, f"{KEYS}/{path}", json={} if method == "PATCH" else None)
    error_message(response, 404, code="key_not_found")


async def test_a_taken_name_and_changes_of_a_revoked_key_are_refused(client: httpx.AsyncClient) -> None:
    await create_key(client)
    for name in ("app", "chatter"):
        error_message(await client.post(KEYS, json={"name": name}), 409, param="name", code="name_taken")
    await client.post(f"{KEYS}/app/revoke")
    assert "revoked" in error_message(await client.patch(f"{KEYS}/app", json={"enabled": True}), 400)
    assert "revoked" in error_message(await client.post(f"{KEYS}/app/rotate"), 400)
    error_message(await client.post(f"{KEYS}/app/rotate", json={"overlap": -1}), 400, param="overlap")


async def test_browsers_may_change_keys(client: httpx.AsyncClient) -> None:
    for method in ("PATCH", "DELETE"):
        headers = {"Origin": "https://console.example", "Access-Control-Request-Method": method}
        assert (await client.options(f"{KEYS}/app", headers=headers)).status_code == 200


@pytest.mark.parametrize("path", [KEYS, f"{KEYS}/boss", "/admin/api/audit", "/admin/api/usage", "/admin/api/requests"])
async def test_the_admin_api_needs_the_admin_permission(client: httpx.AsyncClient, path: str) -> None:
    response = await client.get(path, headers={"Authorization": f"Bearer {CHAT_KEY}"})
    error_message(response, 403, code="permission_denied")


async def test_no_key_is_created_without_the_admin_permission(client: httpx.AsyncClient, database: Database) -> None:
    response = await client.post(KEYS, json={"name": "app"}, headers={"Authorization": f"Bearer {CHAT_KEY}"})
    error_message(response, 403, code="permission_denied")
    assert Keys(database).list() == []

"""Client side of the admin API in unit tests: keys, paths and refusals."""

from __future__ import annotations

from typing import Any

import httpx

KEY = "sk-admin-0123456789abcdef"
CHAT_KEY = "sk-chat-0123456789abcdef"
KEYS = "/admin/api/keys"


async def create_key(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post(KEYS, json={"name": "app", **fields})
    assert response.status_code == 201, response.text
    created: dict[str, Any] = response.json()
    return created


def error_message(response: httpx.Response, status: int, *, param: str | None = None, code: str | None = None) -> str:
    """Assert that `response` is this error; return its message."""
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (status, param, code), response.text
    return str(error["message"])

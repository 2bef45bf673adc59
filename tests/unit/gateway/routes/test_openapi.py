"""The OpenAPI description."""

from __future__ import annotations

import httpx
import pytest

from tests.admin_api import KEYS

pytestmark = pytest.mark.anyio


async def test_the_description_lists_the_routes_and_their_errors(client: httpx.AsyncClient) -> None:
    paths = (await client.get("/openapi.json")).json()["paths"]
    assert set(paths["/admin/api/keys/{key_id}"]) == {"get", "patch", "delete"}
    for path in (KEYS, "/admin/api/audit", "/admin/api/usage", "/admin/api/requests", "/v1/usage"):
        assert {"200", "400", "401", "403", "503"} <= set(paths[path]["get"]["responses"])
    assert "text/csv" in paths["/v1/usage"]["get"]["responses"]["200"]["content"]

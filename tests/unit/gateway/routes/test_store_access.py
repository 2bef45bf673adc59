"""Routes over an unavailable database, and the memory that an unused one costs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.admin_api import KEYS, error_message

pytestmark = pytest.mark.anyio

Send = Callable[[httpx.AsyncClient], Any]


@pytest.mark.parametrize(
    "send",
    [
        lambda client: client.get(KEYS),
        lambda client: client.post(KEYS, json={"name": "app"}),
        lambda client: client.get("/v1/usage"),
        lambda client: client.get("/admin/api/requests"),
    ],
)
async def test_an_unavailable_database_is_reported_and_used_again_later(
    client: httpx.AsyncClient, tmp_path: Path, logged: list[str], send: Send
) -> None:
    (tmp_path / "keys.db").mkdir()
    response = await send(client)
    message = error_message(response, 503, code="store_unavailable")
    assert int(response.headers["retry-after"]) >= 1
    assert str(tmp_path) not in message
    assert any(str(tmp_path) in line for line in logged)
    (tmp_path / "keys.db").rmdir()
    assert (await send(client)).status_code in {200, 201}


async def test_sqlalchemy_is_not_imported_before_the_database_is_used() -> None:
    script = "import sys, llm_api_server.gateway.app; print([m for m in sys.modules if m in ('sqlalchemy', 'alembic')])"
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert found.stdout == "[]\n"

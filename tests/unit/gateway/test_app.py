"""Routes of the built app, the permission that each needs, and the credentials that open none."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import iter_route_contexts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.types import ASGIApp

from llm_api_server.auth.access import Key
from llm_api_server.config.models import ApiKeyConfig, AuthConfig, Config
from llm_api_server.gateway import app as gateway_app
from llm_api_server.gateway.manager_link.leases import Leases
from llm_api_server.gateway.manager_link.link import ManagerLink
from llm_api_server.gateway.middleware import Dispatcher
from llm_api_server.gateway.routes.console import ConsoleFiles
from llm_api_server.gateway.wire.endpoints import ENDPOINTS
from llm_api_server.http_client.client import HttpClient
from llm_api_server.ipc.run_dir import RunDir

PUBLIC = "public"
ANY_KEY = "any key"
#: Permission that each route needs. A new route belongs here.
NEEDED = {
    "GET /": PUBLIC,
    "GET /health": PUBLIC,
    "GET /livez": PUBLIC,
    "GET /readyz": PUBLIC,
    "GET /docs": PUBLIC,
    "GET /openapi.json": PUBLIC,
    "GET /metrics": "metrics",
    "GET /v1/models": ANY_KEY,
    "GET /v1/models/{model_id:path}": ANY_KEY,
    "POST /auth/token": ANY_KEY,
    "GET /admin/api/models": "admin",
    "GET /admin/api/models/{model_id:name}": "admin",
    "DELETE /admin/api/models/{model_id:name}": "admin",
    "GET /admin/api/models/{model_id:name}/explain": "admin",
    "POST /admin/api/models/{model_id:name}/load": "admin",
    "POST /admin/api/models/{model_id:name}/unload": "admin",
    "POST /admin/api/models/{model_id:name}/pin": "admin",
    "POST /admin/api/models/{model_id:name}/unpin": "admin",
    "GET /admin/api/status": "admin",
    "GET /admin/api/config": "admin",
    "GET /admin/api/logs": "admin",
    "GET /admin/api/logs/{name:name}": "admin",
    "POST /admin/api/models/pull": "admin",
    "GET /admin/api/pulls": "admin",
    "GET /admin/api/pulls/{pull_id}": "admin",
    "GET /admin/api/pulls/{pull_id}/events": "admin",
    "POST /admin/api/pulls/{pull_id}/add": "admin",
    "DELETE /admin/api/pulls/{pull_id}": "admin",
    "POST /admin/api/reload": "admin",
    "GET /admin/api/keys": "admin",
    "POST /admin/api/keys": "admin",
    "GET /admin/api/keys/{key_id:name}": "admin",
    "PATCH /admin/api/keys/{key_id:name}": "admin",
    "DELETE /admin/api/keys/{key_id:name}": "admin",
    "POST /admin/api/keys/{key_id:name}/rotate": "admin",
    "POST /admin/api/keys/{key_id:name}/revoke": "admin",
    "GET /admin/api/audit": "admin",
    "GET /admin/api/usage": "admin",
    "GET /admin/api/requests": "admin",
    "GET /admin/api/requests/live": "admin",
    "GET /v1/usage": ANY_KEY,
    "POST /v1/chat/completions": "chat",
    "POST /v1/completions": "completions",
    "POST /v1/embeddings": "embeddings",
    "POST /pooling": "embeddings",
    "POST /v1/responses": "responses",
    "POST /v1/messages": "messages",
    "POST /v1/messages/count_tokens": "messages",
    "POST /v1/rerank": "rerank",
    "POST /v2/rerank": "rerank",
    "POST /rerank": "rerank",
    "POST /v1/score": "rerank",
    "POST /score": "rerank",
    "POST /classify": "rerank",
    "POST /tokenize": "tokenize",
    "POST /detokenize": "tokenize",
    "POST /v1/tokenize": "tokenize",
    "POST /v1/detokenize": "tokenize",
    "POST /v1/audio/transcriptions": "audio",
    "POST /v1/audio/translations": "audio",
}
NEEDED |= {f"GET {path}": PUBLIC for path in ConsoleFiles().paths}
PERMISSIONS = sorted(set(NEEDED.values()) - {PUBLIC, ANY_KEY})
CLOSED = sorted(route for route, needed in NEEDED.items() if needed != PUBLIC)
RESTRICTED = sorted(route for route, needed in NEEDED.items() if needed in PERMISSIONS)
Headers = list[tuple[bytes, bytes]]


class NoKeys:
    """Key source of a store without keys."""

    def __init__(self, _: ManagerLink) -> None:
        return

    def when_changed(self, _: Any) -> None:
        return

    async def find(self, *, digest: str | None = None, key_id: str | None = None) -> Key | None:
        assert digest or key_id
        return None


def key_without(permission: str) -> str:
    return f"sk-everything-except-{permission}"


@pytest.fixture(scope="module")
def app() -> Iterator[ASGIApp]:
    keys = [
        ApiKeyConfig.model_validate(
            {"key": key_without(one), "name": f"no {one}", "permissions": [p for p in PERMISSIONS if p != one]}
        )
        for one in PERMISSIONS
    ]
    config = Config(auth=AuthConfig(api_keys=keys, secret_key="dY0p7Qm2Zx9Lr4Wv6Tb8Nc1Kf3Hs5Ga0Ej"))
    upstream = HttpClient()
    with tempfile.TemporaryDirectory(prefix="gw-") as path, pytest.MonkeyPatch.context() as patch:
        patch.setattr(gateway_app, "KeySource", NoKeys)
        yield gateway_app.build_app(config, Leases(ManagerLink(RunDir(Path(path)), lambda _: None)), upstream)
    upstream.close()


def status_of(app: ASGIApp, route: str, headers: Headers) -> int:
    """Return the status of a request without a body."""
    method, _, path = route.partition(" ")
    path = path.replace("{model_id:path}", "m").replace("{model_id:name}", "m").replace("{key_id:name}", "k")
    sent: list[Any] = []
    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"headers": headers, "client": ("127.0.0.1", 1), "server": ("test", 80), "scheme": "http"}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type] # a coroutine, typed as an awaitable
    return int(sent[0]["status"])


def routes_of(app: Any) -> set[str]:
    while not isinstance(app, Dispatcher):
        app = app._app
    routes = iter_route_contexts(app._routes.routes)  # type: ignore[attr-defined] # a FastAPI
    found = {f"{method} {route.path}" for route in routes for method in (route.methods or ()) if method != "HEAD"}
    return found | {f"POST {path}" for path in app._endpoints}


def test_every_route_is_listed(app: ASGIApp) -> None:
    assert routes_of(app) == set(NEEDED)
    assert {f"POST {path}": endpoint.permission for path, endpoint in ENDPOINTS.items()}.items() <= NEEDED.items()


@pytest.mark.parametrize("route", CLOSED)
def test_no_route_opens_without_a_key_or_with_a_wrong_one(app: ASGIApp, route: str) -> None:
    assert status_of(app, route, []) == 401
    assert status_of(app, route, [(b"authorization", b"Bearer sk-wrong")]) == 401


@pytest.mark.parametrize("route", RESTRICTED)
def test_no_route_opens_without_its_permission(app: ASGIApp, route: str) -> None:
    key = key_without(NEEDED[route]).encode()
    assert status_of(app, route, [(b"authorization", b"Bearer " + key)]) == 403


@pytest.mark.parametrize("route", [route for route, needed in NEEDED.items() if needed == PUBLIC])
def test_public_routes_need_no_key(app: ASGIApp, route: str) -> None:
    assert status_of(app, route, []) not in {401, 403}


value = st.binary(max_size=60) | st.builds(
    lambda scheme, rest: scheme + rest,
    st.sampled_from(
        [b"Bearer ", b"bearer\t", b"Basic ", b"Bearer  ", b"Bearer sk-", b"Bearer a.b.", b"Bearer eyJ.eyJ."]
    ),
    st.binary(max_size=60),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(headers=st.lists(st.tuples(st.sampled_from([b"authorization", b"x-api-key"]), value), max_size=4))
def test_no_malformed_credentials_crash_or_bypass_authentication(app: ASGIApp, headers: Headers) -> None:
    assert status_of(app, "GET /v1/models", headers) == 401

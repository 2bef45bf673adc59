"""Keys, tokens and their permissions."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_api_server.auth.access import Key, digest
from llm_api_server.ipc import messages as control
from llm_api_server.ipc.run_dir import RunDir
from tests.gateway_worker import CHAT_KEY, KEY, Gateway, make_config, run_gateway

pytestmark = pytest.mark.anyio


async def test_everything_but_the_public_paths_needs_a_key(gateway: Gateway) -> None:
    document = (await gateway.client.get("/openapi.json")).json()
    public = {"/", "/health", "/livez", "/readyz", "/docs", "/openapi.json"}
    for path in {*document["paths"], "/nothing", "/v1/models/x/y", "/admin/api/models", "/metrics"} - public:
        for method in ("GET", "POST", "OPTIONS"):
            response = await gateway.client.request(method, path, headers={"authorization": ""})
            assert response.status_code == 401, (method, path)
            assert response.headers["www-authenticate"].startswith("Bearer")
            assert response.headers["x-request-id"]
    for path in public:
        assert (await gateway.client.get(path, headers={"authorization": ""})).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{"authorization": "Bearer sk-wrong"}, {"authorization": "Bearer \xff"}, {"authorization": "Basic abc"},
     {"authorization": "Bearer a.b.c"}, {"x-api-key": "sk-wrong", "authorization": ""}],
)  # fmt: skip
async def test_wrong_keys_are_401(gateway: Gateway, headers: dict[str, str]) -> None:
    raw = {name: value.encode("latin-1") for name, value in headers.items()}
    response = await gateway.client.get("/v1/models", headers=raw)  # type: ignore[arg-type]
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"


async def test_key_is_accepted_as_anthropic_clients_send_it(gateway: Gateway) -> None:
    headers = {"x-api-key": KEY, "authorization": ""}
    assert (await gateway.client.get("/v1/models", headers=headers)).status_code == 200


async def test_errors_under_messages_have_anthropics_form(gateway: Gateway) -> None:
    response = await gateway.client.post("/v1/messages", headers={"authorization": ""}, json={})
    assert response.status_code == 401
    assert response.json()["type"] == "error"
    assert response.json()["error"]["type"] == "authentication_error"
    response = await gateway.client.post("/v1/messages", json={"model": "m", "messages": []})
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_key_is_held_to_its_permissions_and_models(gateway: Gateway) -> None:
    gateway.client.headers["authorization"] = f"Bearer {CHAT_KEY}"
    assert (await gateway.chat()).status_code == 200
    refused = await gateway.client.post("/v1/completions", json={"model": "m", "prompt": "x"})
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "permission_denied"
    assert (await gateway.chat(model="org/blind")).status_code == 403
    assert (await gateway.chat(model="nope")).status_code == 404
    assert (await gateway.client.get("/admin/api/models")).status_code == 403
    listed = (await gateway.client.get("/v1/models")).json()
    assert [model["id"] for model in listed["data"]] == ["m"]
    assert (await gateway.client.get("/v1/models/org/blind")).status_code == 404


async def test_key_is_looked_up_again_after_keys_changed(gateway: Gateway) -> None:
    gateway.manager.keys = {digest("sk-of-the-store"): Key("bob", "id-of-bob", frozenset({"chat"}))}
    gateway.client.headers["authorization"] = "Bearer sk-of-the-store"
    for _ in range(3):
        assert (await gateway.chat()).status_code == 200
    assert len(gateway.manager.received_of(control.FindKey)) == 1
    gateway.manager.keys = {}
    gateway.manager.change_keys(["id-of-bob"])
    response = await gateway.chat()
    while response.status_code == 200:  # until the message arrives
        response = await gateway.chat()
    assert response.status_code == 401


async def test_token_has_at_most_the_rights_of_its_key(run_dir: RunDir, engine_socket: Path) -> None:
    config = make_config(run_dir)
    auth = config.auth.model_copy(update={"secret_key": "0123456789abcdef" * 3, "tokens": True})
    async with run_gateway(run_dir, engine_socket, config.model_copy(update={"auth": auth})) as gateway:
        issued = await gateway.client.post("/auth/token", json={"permissions": ["chat"], "expires_in": 60})
        assert (issued.status_code, issued.json()["token_type"]) == (200, "bearer")
        assert 0 < issued.json()["expires_in"] <= 60
        wider = await gateway.client.post("/auth/token", json={"permissions": ["everything"]})
        assert (wider.status_code, wider.json()["error"]["param"]) == (400, "permissions")
        wrong = await gateway.client.post("/auth/token", json={"expires_in": "soon"})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "expires_in")
        gateway.client.headers["authorization"] = f"Bearer {issued.json()['access_token']}"
        assert (await gateway.chat()).status_code == 200
        assert (await gateway.client.post("/v1/completions", json={"prompt": "x"})).status_code == 403
        assert (await gateway.client.post("/auth/token")).status_code == 403


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"permissions": ["\\ud83d"]}', "permissions"),
        (b'{"permissions": ["chat", "x\\udc00"]}', "permissions"),
        (b'{"models": ["\\ud83d"]}', "models"),
        (b'{"models": ["*", "a\\udfff*"]}', "models"),
        (b'{"expires_in": "\\ud83d"}', "expires_in"),
    ],
)
async def test_a_lone_surrogate_in_a_token_request_is_refused(
    run_dir: RunDir, engine_socket: Path, body: bytes, param: str
) -> None:
    config = make_config(run_dir)
    auth = config.auth.model_copy(update={"secret_key": "0123456789abcdef" * 3, "tokens": True})
    async with run_gateway(run_dir, engine_socket, config.model_copy(update={"auth": auth})) as gateway:
        headers = {"content-type": "application/json"}
        response = await gateway.client.post("/auth/token", content=body, headers=headers)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["type"] == "invalid_request_error"
        assert response.json()["error"]["param"].startswith(param)


async def test_disabled_tokens_are_not_supported(gateway: Gateway) -> None:
    response = await gateway.client.post("/auth/token")
    assert (response.status_code, response.json()["error"]["code"]) == (400, "not_supported")

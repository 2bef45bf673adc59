"""Routes around the data path: models, their administration, the OpenAPI description."""

from __future__ import annotations

import json
import re

import pytest

from llm_api_server.ipc import messages as control
from llm_api_server.ipc.model_status import ModelStatus
from llm_api_server.types import ModelState
from tests.gateway_worker import CHAT_KEY, Gateway
from tests.waiting import until

pytestmark = pytest.mark.anyio


async def test_models_are_listed_and_found_by_name_and_alias(gateway: Gateway) -> None:
    listed = (await gateway.client.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["m", "org/lora", "org/blind", "org/gone"]
    assert {"id", "object", "created", "owned_by"} <= set(listed["data"][0])
    assert listed["data"][0]["status"] == "ready"
    assert listed["data"][0]["context_length"] == 2000
    assert (await gateway.client.get("/v1/models/gpt-4o")).json()["id"] == "m"
    assert (await gateway.client.get("/v1/models/org/blind")).json()["id"] == "org/blind"
    assert (await gateway.client.get("/v1/models/org%2Fblind")).json()["id"] == "org/blind"
    assert (await gateway.client.get("/v1/models/nope")).json()["error"]["code"] == "model_not_found"


async def test_adapter_is_a_model_with_a_parent(gateway: Gateway) -> None:
    one = (await gateway.client.get("/v1/models/org/lora")).json()
    assert (one["id"], one["parent"], one["status"], one["aliases"]) == ("org/lora", "m", "ready", [])
    assert (await gateway.client.get("/v1/models/m")).json()["parent"] is None
    assert (await gateway.client.get("/admin/api/models/org/lora")).json()["adapters"] == ["org/lora"]
    assert (await gateway.client.post("/admin/api/models/org/lora/load")).json()["id"] == "m"
    gateway.client.headers["authorization"] = f"Bearer {CHAT_KEY}"
    assert [model["id"] for model in (await gateway.client.get("/v1/models")).json()["data"]] == ["m"]
    assert (await gateway.client.get("/v1/models/org/lora")).status_code == 404
    assert (await gateway.chat(model="org/lora")).status_code == 403


async def test_embedding_instance_is_no_model_of_its_own_to_clients(gateway: Gateway) -> None:
    embedding = "m (embeddings)"
    gateway.manager.models[0].tasks = ("generate", "embed")
    gateway.manager.models.append(ModelStatus(embedding, ModelState.READY, "vllm", "m", tasks=("embed",), twin_of="m"))
    gateway.manager.push_models()
    await until(lambda: embedding in gateway.leases.models)
    listed = (await gateway.client.get("/v1/models")).json()["data"]
    assert embedding not in {model["id"] for model in listed}
    assert {model["id"]: model["tasks"] for model in listed}["m"] == ["generate", "embed"]
    assert (await gateway.chat(model=embedding)).status_code == 404
    admin = {model["id"]: model for model in (await gateway.client.get("/admin/api/models")).json()["data"]}
    assert (admin[embedding]["twin_of"], admin["m"]["twin_of"]) == ("m", None)


async def test_admin_loads_and_unloads(gateway: Gateway) -> None:
    listed = (await gateway.client.get("/admin/api/models")).json()["data"]
    assert {"id", "state", "pid", "memory_bytes", "in_flight", "last_used"} <= set(listed[0])
    assert (await gateway.client.post("/admin/api/models/org/blind/load")).json()["id"] == "org/blind"
    assert (await gateway.client.post("/admin/api/models/org%2Fblind/unload?wait=false")).status_code == 200
    assert gateway.manager.received_of(control.LoadModel)[0].model == "org/blind"
    assert gateway.manager.received_of(control.UnloadModel)[0].wait is False
    assert (await gateway.client.get("/admin/api/models/org/blind")).json()["id"] == "org/blind"
    assert (await gateway.client.post("/admin/api/models/nope/load")).status_code == 404
    invalid = await gateway.client.post("/admin/api/models/m/load?wait=perhaps")
    assert (invalid.status_code, invalid.json()["error"]["param"]) == (400, "wait")
    gateway.manager.refusal = lambda request: control.Refused(request, "model_load_failed", "no room")
    assert (await gateway.client.post("/admin/api/models/m/load")).status_code == 503


async def test_description_names_every_endpoint_and_its_errors(gateway: Gateway) -> None:
    document = (await gateway.client.get("/openapi.json")).json()
    chat = document["paths"]["/v1/chat/completions"]["post"]
    schema = document["components"]["schemas"]["ChatRequest"]
    assert schema["required"] == ["messages"]
    assert {"model", "messages", "stream", "max_tokens", "tools"} <= set(schema["properties"])
    assert chat["responses"]["400"]["content"]["application/json"]["schema"]["$ref"].endswith("/Error")
    assert "422" not in json.dumps(document)
    names = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)))
    assert names <= set(document["components"]["schemas"])
    assert "/docs" not in document["paths"]
    assert "http" not in (await gateway.client.get("/docs")).text.replace("<http", "")

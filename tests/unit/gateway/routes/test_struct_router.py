"""Structs as responses: FastAPI describes and sends their fields, and leaves out internal ones."""

from __future__ import annotations

from typing import Annotated, Any

import httpx
import msgspec
import pytest
from fastapi import FastAPI
from msgspec import Meta

from llm_api_server.admin import usage_rows
from llm_api_server.gateway.routes.struct_router import StructRouter, model_of
from llm_api_server.ipc.model_status import ModelStatus
from llm_api_server.store.ledger_rows import RequestRow, UsageSum, UsageTotal
from llm_api_server.types import INTERNAL, ModelState

pytestmark = pytest.mark.anyio


class Part(msgspec.Struct, frozen=True):
    """One part."""

    name: str
    secret: Annotated[str, INTERNAL] = "hidden"


class Parts(msgspec.Struct, rename={"sizes": "lengths"}):
    data: list[Part]
    sizes: Annotated[tuple[int, ...] | None, Meta(description="In bytes.")] = None


@pytest.fixture
def app() -> FastAPI:
    router = StructRouter()

    @router.get("/parts")
    async def parts() -> Parts:
        return Parts([Part("a"), Part("b")], (1, 2))

    @router.get("/plain")
    async def plain() -> dict[str, int]:
        return {"a": 1}

    app = FastAPI()
    app.include_router(router)
    return app


@pytest.mark.parametrize(
    ("path", "body"),
    [("/parts", {"data": [{"name": "a"}, {"name": "b"}], "lengths": [1, 2]}), ("/plain", {"a": 1})],
)
async def test_a_struct_is_sent_with_encoded_names_and_without_internal_fields(
    app: FastAPI, path: str, body: dict[str, Any]
) -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        assert (await client.get(path)).json() == body


def test_the_description_has_all_fields_as_required(app: FastAPI) -> None:
    schemas = app.openapi()["components"]["schemas"]
    assert schemas["Parts"]["required"] == ["data", "lengths"]
    assert schemas["Parts"]["properties"]["lengths"]["description"] == "In bytes."
    assert schemas["Parts"]["properties"]["data"]["items"] == {"$ref": "#/components/schemas/Part"}
    assert "description" not in schemas["Parts"]
    assert schemas["Part"] == {
        "description": "One part.",
        "properties": {"name": {"type": "string", "title": "Name"}},
        "type": "object",
        "required": ["name"],
        "title": "Part",
    }


def test_clients_see_no_fields_of_a_model_that_only_workers_need() -> None:
    status = ModelStatus("m", ModelState.READY, "vllm", "m", chat_template=True, ready_at=1.0)
    shown = model_of(ModelStatus).model_validate(status, from_attributes=True).model_dump()
    assert set(ModelStatus.__struct_fields__) - shown.keys() == {"chat_template", "ready_at"}


def test_the_columns_of_a_usage_report_are_its_described_fields() -> None:
    assert tuple(model_of(RequestRow).model_fields) == usage_rows.REQUEST_COLUMNS
    assert tuple(model_of(UsageTotal).model_fields) == usage_rows.SUM_COLUMNS
    required = {name for name, field in model_of(UsageSum).model_fields.items() if field.is_required()}
    assert required == set(usage_rows.SUM_COLUMNS)

"""`/admin/api/models`: state and memory of the models; loading, unloading and pinning them."""

from __future__ import annotations

from typing import Annotated

import msgspec
from fastapi import APIRouter, Query

from llm_api_server.errors import ModelNotFound
from llm_api_server.gateway.manager_link.model_commands import ModelCommands
from llm_api_server.gateway.proxy.model_catalog import ModelCatalog
from llm_api_server.gateway.routes.admin_router import admin_router
from llm_api_server.gateway.routes.public import KeyDependency
from llm_api_server.ipc.model_status import Explanation, ModelStatus


class ModelStatusList(msgspec.Struct):
    data: list[ModelStatus]


Wait = Annotated[bool, Query(description="Respond when it is done; false: respond at once.")]


def admin_model_routes(catalog: ModelCatalog, commands: ModelCommands) -> APIRouter:
    router = admin_router()

    @router.get("/models", summary="List all configured models")
    async def list_models() -> ModelStatusList:
        return ModelStatusList(await commands.list_models())

    @router.post("/models/{model_id:name}/load", summary="Load a model")
    async def load(model_id: str, key: KeyDependency, *, wait: Wait = True) -> ModelStatus:
        name = catalog.find(model_id, key).model
        return _pick(await commands.load(name, wait=wait), name)

    @router.post("/models/{model_id:name}/unload", summary="Drain and unload a model")
    async def unload(model_id: str, key: KeyDependency, *, wait: Wait = True) -> ModelStatus:
        name = catalog.find(model_id, key).model
        return _pick(await commands.unload(name, wait=wait), name)

    @router.post("/models/{model_id:name}/pin", summary="Keep a loaded model from eviction and idle unloading")
    async def pin(model_id: str, key: KeyDependency) -> ModelStatus:
        name = catalog.find(model_id, key).model
        return _pick(await commands.pin(name, is_pinned=True), name)

    @router.post("/models/{model_id:name}/unpin", summary="Allow eviction and idle unloading again")
    async def unpin(model_id: str, key: KeyDependency) -> ModelStatus:
        name = catalog.find(model_id, key).model
        return _pick(await commands.pin(name, is_pinned=False), name)

    @router.get("/models/{model_id:name}/explain", summary="Explain whether a model would fit, with the arithmetic")
    async def explain(model_id: str, key: KeyDependency) -> Explanation:
        return await commands.explain(catalog.find(model_id, key).model)

    @router.get("/models/{model_id:name}", summary="Show one model")
    async def get_model(model_id: str, key: KeyDependency) -> ModelStatus:
        return _pick(await commands.list_models(), catalog.find(model_id, key).model)

    return router


def _pick(models: list[ModelStatus], name: str) -> ModelStatus:
    for model in models:
        if model.id == name:
            return model
    raise ModelNotFound(f"The manager has no model '{name}' (yet); try again.", param="model")

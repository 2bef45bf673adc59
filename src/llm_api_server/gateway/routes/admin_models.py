"""`/admin/api/models`: what the models do and memory they hold, loading and unloading them. Needs `admin`."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field

from llm_api_server.errors import ModelNotFound, PermissionDenied
from llm_api_server.gateway.manager_link.leases import Leases
from llm_api_server.gateway.proxy.model_catalog import ModelCatalog
from llm_api_server.gateway.routes.public import KeyDependency
from llm_api_server.ipc.model_status import ModelStatus, Verdict
from llm_api_server.types import EngineName, ModelState, Task


class AdminModel(BaseModel):
    """One model as the manager sees it. Times are Unix seconds."""

    id: str
    state: ModelState
    engine: EngineName
    path: str
    aliases: list[str]
    adapters: list[str]
    context_length: int | None
    vision: bool | None
    tasks: list[Task] | None = Field(description="What it can be asked for.")
    twin_of: str | None = Field(description="Set for the second process of a model, which embeds; none while stopped.")
    error: str | None
    retry_at: float | None
    instance: str | None
    pid: int | None
    memory_bytes: int | None
    devices: dict[str, int]
    in_flight: int
    queued: int
    preloaded: bool
    pinned: bool = Field(description="It stays loaded until it is unpinned or unloaded.")
    last_used: float | None
    loaded_at: float | None
    load_seconds: float | None
    progress_at: float | None
    phase: str | None
    phases: dict[str, float]


class AdminModelList(BaseModel):
    data: list[AdminModel]


class AdminDevice(BaseModel):
    """Memory of a GPU or of the machine, in bytes. `taken`: by model; `foreign`: by other programs."""

    id: str
    name: str
    total: int
    limit: int
    foreign: int
    taken: dict[str, int]
    free: int


class AdminExplanation(BaseModel):
    """Whether a model would fit. `takes`: bytes of each device it would be given."""

    model: str
    verdict: Verdict
    message: str
    evict: list[str]
    needs: str | None
    takes: dict[str, int]
    places: int
    places_free: int
    devices: list[AdminDevice]


def require_admin(key: KeyDependency) -> None:
    if not key.may("admin"):
        raise PermissionDenied("Your key has no permission for the admin API ('admin').")


def admin_routes(catalog: ModelCatalog, leases: Leases) -> APIRouter:
    router = APIRouter(prefix="/admin/api", tags=["admin"], dependencies=[Depends(require_admin)])

    @router.get("/models", summary="All configured models")
    async def list_models() -> AdminModelList:
        return AdminModelList(data=[_as_admin_model(model) for model in await leases.list_models()])

    @router.post("/models/{model_id:name}/load", summary="Load a model")
    async def load(model_id: str, key: KeyDependency, *, wait: Wait = True) -> AdminModel:
        name = catalog.find(model_id, key).model
        return _pick(await leases.load(name, wait=wait), name)

    @router.post("/models/{model_id:name}/unload", summary="Drain and unload a model")
    async def unload(model_id: str, key: KeyDependency, *, wait: Wait = True) -> AdminModel:
        name = catalog.find(model_id, key).model
        return _pick(await leases.unload(name, wait=wait), name)

    @router.post("/models/{model_id:name}/pin", summary="Keep a loaded model: neither evicted nor unloaded when idle")
    async def pin(model_id: str, key: KeyDependency) -> AdminModel:
        name = catalog.find(model_id, key).model
        return _pick(await leases.pin(name, is_pinned=True), name)

    @router.post("/models/{model_id:name}/unpin", summary="Let a model go again when it is idle or in the way")
    async def unpin(model_id: str, key: KeyDependency) -> AdminModel:
        name = catalog.find(model_id, key).model
        return _pick(await leases.pin(name, is_pinned=False), name)

    @router.get("/models/{model_id:name}/explain", summary="Whether a model would fit, with the arithmetic")
    async def explain(model_id: str, key: KeyDependency) -> AdminExplanation:
        return AdminExplanation(**msgspec.to_builtins(await leases.explain(catalog.find(model_id, key).model)))

    @router.get("/models/{model_id:name}", summary="One model")
    async def get_model(model_id: str, key: KeyDependency) -> AdminModel:
        return _pick(await leases.list_models(), catalog.find(model_id, key).model)

    return router


Wait = Annotated[bool, "Answer when it is done; false: at once."]


def _pick(models: list[ModelStatus], name: str) -> AdminModel:
    for model in models:
        if model.id == name:
            return _as_admin_model(model)
    raise ModelNotFound(f"The manager does not know the model '{name}'.", param="model")


def _as_admin_model(status: ModelStatus) -> AdminModel:
    content: dict[str, Any] = msgspec.to_builtins(status)
    return AdminModel(**content)

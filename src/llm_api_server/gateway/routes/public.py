"""Routes that are not the data path: health, models, tokens, documentation. Answer from memory, never wait."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from llm_api_server import __version__
from llm_api_server.auth.access import Key
from llm_api_server.auth.authenticator import Authenticator
from llm_api_server.errors import ModelNotFound, NotSupported, PermissionDenied
from llm_api_server.gateway.manager_link.leases import Leases
from llm_api_server.gateway.manager_link.link import ManagerLink
from llm_api_server.gateway.metering.request_record import record_of
from llm_api_server.gateway.proxy.model_catalog import Found, ModelCatalog
from llm_api_server.ipc.model_status import ModelStatus
from llm_api_server.types import ModelState, Task

#: Answered without a key. Everything else is closed.
PUBLIC_PATHS = frozenset({"/", "/health", "/livez", "/readyz", "/docs", "/openapi.json"})


class Welcome(BaseModel):
    name: str = "LLM API Server"
    version: str = __version__
    docs: str = "/docs"


class Health(BaseModel):
    status: Literal["ok", "unavailable"] = "ok"
    reason: str | None = None


class ListedModel(BaseModel):
    """OpenAI's four fields, and what this server knows besides."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "llm-api-server"
    status: str = Field(description="stopped, starting, ready, draining, stopping or failed")
    engine: str | None = None
    context_length: int | None = None
    max_model_len: int | None = Field(None, description="vLLM's name for context_length.")
    vision: bool | None = None
    tasks: list[Task] | None = Field(None, description="What it can be asked for; null: not known.")
    aliases: list[str] = []
    parent: str | None = Field(None, description="Of an adapter: the model that it adapts.")
    error: str | None = Field(None, description="Why the last load failed.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ListedModel]


class TokenRequest(BaseModel):
    """Rights narrower than the key's, if wanted."""

    model_config = ConfigDict(strict=True)

    expires_in: float | None = Field(None, gt=0, description="Seconds; at most the configured time.")
    permissions: list[str] | None = None
    models: list[str] | None = None


class Token(BaseModel):
    access_token: str
    token_type: Literal["bearer"] = "bearer"  # noqa: S105 - not a secret
    expires_in: int


def key_of(request: Request) -> Key:
    """The key that the authentication middleware found."""
    key = record_of(request.scope).key
    assert key is not None, "the path is public"
    return key


KeyDependency = Annotated[Key, Depends(key_of)]


def system_routes(link: ManagerLink, docs_page: str) -> APIRouter:
    """`/`, `/health`, `/livez`, `/readyz`, `/docs`."""
    router = APIRouter(tags=["system"])

    @router.get("/", summary="Name and version")
    async def welcome() -> Welcome:
        return Welcome()

    @router.get("/health", summary="This process answers")
    @router.get("/livez", summary="This process answers")
    async def live() -> Health:
        return Health()

    @router.get("/readyz", summary="New requests are accepted", responses={503: {"model": Health}})
    async def ready() -> Any:
        if link.is_closing:
            return _unavailable("shutting down")
        if not link.is_connected:
            return _unavailable("the model manager does not answer")
        return Health()

    @router.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(docs_page, headers={"content-security-policy": "frame-ancestors 'none'"})

    return router


def model_routes(catalog: ModelCatalog, leases: Leases) -> APIRouter:
    """`/v1/models`: every model the key may use, loaded or not. Any valid key may look."""
    router = APIRouter(tags=["models"])

    def describe(found: Found) -> ListedModel:
        return _describe(found, leases.models.get(found.model), catalog.created)

    @router.get("/v1/models", summary="List the models that the key may use")
    async def list_models(key: KeyDependency) -> ModelList:
        return ModelList(data=[describe(found) for found in catalog.all if key.may_use(found.name)])

    @router.get("/v1/models/{model_id:path}", summary="One model or adapter, by name or alias")
    async def get_model(model_id: str, key: KeyDependency) -> ListedModel:
        try:
            return describe(catalog.find(model_id, key))
        except PermissionDenied as error:  # a list that hides a model must not be contradicted here
            raise ModelNotFound(f"The model '{model_id}' does not exist or you do not have access to it.") from error

    return router


def token_routes(authenticator: Authenticator | None) -> APIRouter:
    """`POST /auth/token`: a key for a short-lived token with the same or fewer rights."""
    router = APIRouter(tags=["auth"])

    @router.post("/auth/token", summary="Exchange a key for a short-lived token")
    async def issue(request: Request, key: KeyDependency, wanted: TokenRequest | None = None) -> Token:
        tokens = authenticator.tokens if authenticator is not None else None
        if tokens is None:
            raise NotSupported("Tokens are off: set auth.secret_key to a secret of at least 32 bytes.")
        if record_of(request.scope).by_token:
            raise PermissionDenied("A token cannot be exchanged for another; send the key itself.")
        wanted = wanted or TokenRequest()
        token, expires_at = tokens.issue(key, wanted.permissions, wanted.models, wanted.expires_in)
        return Token(access_token=token, expires_in=max(0, round(expires_at - time.time())))

    return router


def _unavailable(reason: str) -> JSONResponse:
    body = Health(status="unavailable", reason=reason)
    return JSONResponse(body.model_dump(), 503, headers={"retry-after": "1"})


def _describe(found: Found, status: ModelStatus | None, created: int) -> ListedModel:
    """Before the manager's first word a model counts as stopped. An adapter is in the state of its model."""
    parent = found.model if found.adapter else None
    if status is None:
        return ListedModel(id=found.name, created=created, status=ModelState.STOPPED, parent=parent)
    return ListedModel(
        id=found.name,
        created=created,
        parent=parent,
        status=status.state,
        engine=status.engine,
        context_length=status.context_length,
        max_model_len=status.context_length,
        vision=status.vision,
        tasks=list(status.tasks) if status.tasks is not None else None,
        aliases=[] if found.adapter else status.aliases,
        error=status.error,
    )

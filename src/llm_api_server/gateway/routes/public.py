"""Routes outside the data path: health, documentation, metrics, models and tokens.

All but `/metrics` respond from memory and never wait.
"""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from llm_api_server import __version__
from llm_api_server.auth.access import Key
from llm_api_server.auth.authenticator import Authenticator
from llm_api_server.errors import ModelNotFound, NotSupported, PermissionDenied
from llm_api_server.gateway.manager_link.leases import Leases
from llm_api_server.gateway.manager_link.link import ManagerLink
from llm_api_server.gateway.metering.request_record import record_of
from llm_api_server.gateway.metering.usage_reporter import UsageReporter
from llm_api_server.gateway.proxy.model_catalog import Found, ModelCatalog
from llm_api_server.gateway.wire.known_paths import unknown_url
from llm_api_server.ipc import messages
from llm_api_server.ipc.model_status import ModelStatus
from llm_api_server.types import ModelState, Task

#: Paths that need no key. All others do.
PUBLIC_PATHS = frozenset({"/", "/health", "/livez", "/readyz", "/docs", "/openapi.json"})


class Welcome(BaseModel):
    name: str = "LLM API Server"
    version: str = __version__
    docs: str = "/docs"


class Health(BaseModel):
    status: Literal["ok", "unavailable"] = "ok"
    reason: str | None = None


class ListedModel(BaseModel):
    """OpenAI's four fields, and more that this server knows."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "llm-api-server"
    status: str = Field(description="stopped, starting, ready, draining, stopping or failed")
    engine: str | None = None
    context_length: int | None = None
    max_model_len: int | None = Field(None, description="vLLM's name for context_length.")
    vision: bool | None = None
    tasks: list[Task] | None = Field(None, description="Supported tasks; null: unknown.")
    aliases: list[str] = []
    parent: str | None = Field(None, description="The base model, if this is an adapter.")
    error: str | None = Field(None, description="Reason why the last load failed.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ListedModel]


class TokenRequest(BaseModel):
    """Rights of the token; absent ones are those of the key."""

    model_config = ConfigDict(strict=True)

    expires_in: float | None = Field(None, gt=0, description="Seconds; limited by auth.token_timeout.")
    permissions: list[str] | None = None
    models: list[str] | None = None


class Token(BaseModel):
    access_token: str
    token_type: Literal["bearer"] = "bearer"  # noqa: S105 - not a secret
    expires_in: int


class _PrometheusText(Response):
    media_type = "text/plain; version=0.0.4; charset=utf-8"


def key_of(request: Request) -> Key:
    """Return the key that the authentication middleware accepted."""
    key = record_of(request.scope).key
    assert key is not None, "the path is public"
    return key


KeyDependency = Annotated[Key, Depends(key_of)]


def system_routes(link: ManagerLink, docs_page: str) -> APIRouter:
    """`/`, `/health`, `/livez`, `/readyz`, `/docs`."""
    router = APIRouter(tags=["system"])

    @router.get("/", summary="Show name and version")
    async def welcome() -> Welcome:
        return Welcome()

    @router.get("/health", summary="Check that this process responds")
    @router.get("/livez", summary="Check that this process responds")
    async def live() -> Health:
        return Health()

    @router.get("/readyz", summary="Check that new requests are accepted", responses={503: {"model": Health}})
    async def ready() -> Any:
        if link.is_closing:
            return _unavailable("shutting down")
        if not link.is_connected:
            return _unavailable("the model manager does not respond")
        return Health()

    @router.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(docs_page, headers={"content-security-policy": "frame-ancestors 'none'"})

    return router


def metrics_routes(link: ManagerLink, usage: UsageReporter) -> APIRouter:
    """`/metrics`."""
    router = APIRouter(tags=["system"])

    @router.get("/metrics", summary="Read counters and gauges of all processes", response_class=_PrometheusText)
    async def metrics(key: KeyDependency) -> Response:
        if not key.may("metrics"):
            raise PermissionDenied("Your key has no permission for the metrics; give it the permission 'metrics'.")
        usage.report()  # includes requests that ended just now; other workers report within half a second
        response = await link.call(messages.GetMetrics(link.next_number()))
        assert isinstance(response, messages.MetricsText), "the manager's response to this message"
        return _PrometheusText(response.text)

    return router


def model_routes(catalog: ModelCatalog, leases: Leases) -> APIRouter:
    """`/v1/models`: every model the key may use, loaded or not. Any valid key may list them."""
    router = APIRouter(tags=["models"])

    def describe(found: Found) -> ListedModel:
        return _describe(found, leases.models.get(found.model), catalog.created)

    @router.get("/v1/models", summary="List the models that the key may use")
    async def list_models(key: KeyDependency) -> ModelList:
        return ModelList(data=[describe(found) for found in catalog.all if key.may_use(found.name)])

    @router.get("/v1/models/{model_id:path}", summary="Show one model or adapter, by name or alias")
    async def get_model(model_id: str, key: KeyDependency) -> ListedModel:
        if not model_id or model_id.endswith("/"):
            raise unknown_url("GET", f"/v1/models/{model_id}", frozenset({"/v1/models"}))
        try:
            return describe(catalog.find(model_id, key))
        except PermissionDenied as error:  # must not confirm a model that the list hides
            raise ModelNotFound(f"The model '{model_id}' does not exist or you do not have access to it.") from error

    return router


def token_routes(authenticator: Authenticator | None) -> APIRouter:
    """`POST /auth/token`: exchange a key for a short-lived token with the same or fewer rights."""
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
    """Describe a model or adapter; without a status from the manager it counts as stopped."""
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

"""`/admin/api/keys`, `/admin/api/audit`: keys are made, shown and changed, and who changed them. Needs `admin`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from llm_api_server.errors import InvalidRequest
from llm_api_server.gateway.metering.request_record import record_of
from llm_api_server.gateway.routes.admin_models import require_admin
from llm_api_server.gateway.routes.public import key_of
from llm_api_server.gateway.routes.store_access import NO_NUL, StoreAccess
from llm_api_server.times import parse_end
from llm_api_server.types import PriorityClass

if TYPE_CHECKING:
    from llm_api_server.admin.keys import ListedKey
    from llm_api_server.store.keys import Actor, KeyFields

_DAY = 86400.0
_LARGEST = 2**53


class KeyChanges(BaseModel):
    """What is given is changed, the rest stays. `null` takes a limit, the note or the end away."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str | None = Field(None, description="Unique; shown in logs and accounts.")
    note: str | None = Field(None, pattern=NO_NUL, description="Whose it is, or what for.")
    permissions: list[str] | None = Field(None, description="What it may call; `all` by default.")
    models: list[str] | None = Field(None, description="Models it may use; shell patterns; all by default.")
    requests_per_minute: int | None = Field(None, description="Most requests in any 60 seconds.")
    tokens_per_minute: int | None = Field(None, description="Most tokens, prompts and answers, in any 60 seconds.")
    max_concurrent: int | None = Field(None, description="Most requests at the same time.")
    tokens_per_day: int | None = Field(None, description="Most tokens in a day (UTC).")
    tokens_per_month: int | None = Field(None, description="Most tokens in a month (UTC).")
    priority: float | None = Field(None, description="Weight of its requests where several wait; 1 by default.")
    priority_class: PriorityClass | None = Field(
        None, description="interactive, or batch: served when no other request waits."
    )
    expires_at: float | str | None = Field(
        None, description="When it ends: Unix seconds, a time such as 2027-01-31T12:00:00Z, or 30d from now."
    )
    networks: list[str] | None = Field(None, description="Networks it may be used from (CIDR); none: all.")
    enabled: bool | None = Field(None, description="false refuses it.")


class NewKey(KeyChanges):
    """A key to be made. What is not given has its default."""

    name: str = Field(description="Unique; shown in logs and accounts.")


class AdminKey(BaseModel):
    """One key. Times are Unix seconds."""

    id: str
    name: str
    source: Literal["store", "config"] = Field(description="Keys of the configuration are changed there.")
    state: Literal["active", "disabled", "expired", "revoked"]
    note: str | None
    hint: str | None = Field(description="The end of its secret.")
    permissions: list[str]
    models: list[str]
    requests_per_minute: int | None
    tokens_per_minute: int | None
    max_concurrent: int | None
    tokens_per_day: int | None
    tokens_per_month: int | None
    priority: float
    priority_class: PriorityClass
    expires_at: float | None
    networks: list[str]
    enabled: bool
    created_at: float | None
    last_used_at: float | None
    revoked_at: float | None
    old_secret_until: float | None = Field(description="How long a secret that was replaced stays valid.")


class AdminKeyList(BaseModel):
    data: list[AdminKey]


class AdminKeyWithSecret(AdminKey):
    secret: str = Field(description="The key itself. It is answered here only and kept nowhere.")


class DeletedKey(BaseModel):
    id: str
    name: str
    deleted: Literal[True] = True


class Rotation(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    overlap: float = Field(_DAY, ge=0, description="Seconds that the old secret stays valid; 0: it ends now.")


class AuditedChange(BaseModel):
    """One change of a key. `actor` is the name of the key that was used, or `cli:` and a user."""

    revision: int
    at: float
    actor: str
    actor_key_id: str | None
    request_id: str | None
    action: str = Field(description="create, update, rotate, revoke or delete")
    key_id: str
    key_name: str
    changes: dict[str, list[Any]] = Field(description="By field: the old and the new value.")


class Audit(BaseModel):
    data: list[AuditedChange]


def key_routes(store: StoreAccess) -> APIRouter:
    router = APIRouter(prefix="/admin/api", tags=["admin"], dependencies=[Depends(require_admin)])
    _add_reading(router, store)
    _add_changing(router, store)
    return router


def _add_reading(router: APIRouter, store: StoreAccess) -> None:
    @router.get("/keys", summary="All keys, those of the configuration among them")
    async def list_keys() -> AdminKeyList:
        return AdminKeyList(data=[_shown(key) for key in await store.call(lambda stored: stored.managed.list())])

    @router.get("/keys/{key_id:name}", summary="One key, by id or name")
    async def get_key(key_id: str) -> AdminKey:
        return _shown(await store.call(lambda stored: stored.managed.get(key_id)))

    @router.get("/audit", summary="Who changed which key, newest first")
    async def audit(
        key: Annotated[
            str | None, Query(pattern=NO_NUL, description="Only of this key: its id, or a name that it has or had.")
        ] = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        before: Annotated[int | None, Query(ge=0, le=_LARGEST, description="Only before this revision.")] = None,
    ) -> Audit:
        entries = await store.call(lambda stored: stored.keys.audit(key=key, limit=limit, before=before))
        return Audit(data=[AuditedChange(**msgspec.to_builtins(entry)) for entry in entries])


def _add_changing(router: APIRouter, store: StoreAccess) -> None:
    @router.post("/keys", summary="Make a key", status_code=201)
    async def create(body: NewKey, request: Request, response: Response) -> AdminKeyWithSecret:
        key, secret = await store.call(lambda stored: stored.managed.create(_fields(body), _actor(request)))
        return _with_secret(key, secret, response)

    @router.post("/keys/{key_id:name}/rotate", summary="Give a key a new secret")
    async def rotate(
        key_id: str, request: Request, response: Response, body: Rotation | None = None
    ) -> AdminKeyWithSecret:
        overlap = (body or Rotation()).overlap
        key, secret = await store.call(lambda stored: stored.managed.rotate(key_id, overlap, _actor(request)))
        return _with_secret(key, secret, response)

    @router.post("/keys/{key_id:name}/revoke", summary="End a key for good; its record stays")
    async def revoke(key_id: str, request: Request) -> AdminKey:
        return _shown(await store.call(lambda stored: stored.managed.revoke(key_id, _actor(request))))

    @router.patch("/keys/{key_id:name}", summary="Change a key")
    async def update(key_id: str, body: KeyChanges, request: Request) -> AdminKey:
        return _shown(await store.call(lambda stored: stored.managed.update(key_id, _fields(body), _actor(request))))

    @router.delete("/keys/{key_id:name}", summary="Remove a key; usage and audit keep its name")
    async def delete(key_id: str, request: Request) -> DeletedKey:
        gone = await store.call(lambda stored: stored.managed.delete(key_id, _actor(request)))
        return DeletedKey(id=gone.id, name=gone.name)


def _fields(body: KeyChanges) -> KeyFields:
    """Runs in the store's thread."""
    from llm_api_server.store.keys import KeyFields  # noqa: PLC0415 - SQLAlchemy is imported when it is needed

    given = {name: getattr(body, name) for name in body.model_fields_set}
    if isinstance(body.expires_at, str):
        try:
            given["expires_at"] = parse_end(body.expires_at, time.time())
        except ValueError as error:
            raise InvalidRequest(f"Invalid 'expires_at': {error}", param="expires_at") from error
    return KeyFields(**given)


def _actor(request: Request) -> Actor:
    from llm_api_server.store.keys import Actor  # noqa: PLC0415

    key = key_of(request)
    return Actor(key.name, key.key_id, record_of(request.scope).request_id)


def _shown(key: ListedKey) -> AdminKey:
    return AdminKey(**msgspec.to_builtins(key))


def _with_secret(key: ListedKey, secret: str, response: Response) -> AdminKeyWithSecret:
    response.headers["cache-control"] = "no-store"
    return AdminKeyWithSecret(**msgspec.to_builtins(key), secret=secret)

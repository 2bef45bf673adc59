"""`/admin/api/keys`, `/admin/api/audit`: creating, listing and changing API keys, and the log of these changes."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Query, Request, Response
from msgspec import Meta
from pydantic import BaseModel, ConfigDict, Field

from llm_api_server.admin.keys import DEFAULT_OVERLAP, ListedKey
from llm_api_server.config.models import KeyLimits
from llm_api_server.errors import InvalidRequest
from llm_api_server.gateway.metering.request_record import record_of
from llm_api_server.gateway.routes.admin_router import admin_router
from llm_api_server.gateway.routes.public import key_of
from llm_api_server.gateway.routes.store_access import MAX_INTEGER, NO_NUL, StoreAccess
from llm_api_server.store.key_fields import Actor, AuditEntry, KeyFields
from llm_api_server.times import parse_end
from llm_api_server.types import PriorityClass


class KeyChanges(KeyLimits):
    """Fields to change; all others stay. `null` removes a limit, the note or the expiry."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str | None = Field(None, description="Unique; shown in logs and usage reports.")
    note: str | None = Field(None, pattern=NO_NUL, description="Free text, such as the owner or the purpose.")
    permissions: list[str] | None = Field(None, description="Endpoints the key may call; `all` by default.")
    models: list[str] | None = Field(None, description="Models the key may use, as shell patterns; all by default.")
    priority: float | None = Field(None, description="Weight of the key's requests in the queue; 1 by default.")
    priority_class: PriorityClass | None = Field(
        None, description="interactive, or batch: served only when no interactive request waits."
    )
    expires_at: float | str | None = Field(
        None, description="Expiry: Unix seconds, a time such as 2027-01-31T12:00:00Z, or a duration such as 30d."
    )
    networks: list[str] | None = Field(None, description="Networks the key may be used from (CIDR); empty: any.")
    enabled: bool | None = Field(None, description="false: requests with the key are refused.")


class NewKey(KeyChanges):
    """A key to create. Absent fields get their defaults."""

    name: str = Field(description="Unique; shown in logs and usage reports.")


class KeyList(msgspec.Struct):
    data: list[ListedKey]


class KeyWithSecret(ListedKey, frozen=True, kw_only=True):
    """A key and its secret. Times are Unix seconds."""

    secret: Annotated[str, Meta(description="The key itself; sent only in this response and stored nowhere.")]


class DeletedKey(msgspec.Struct):
    id: str
    name: str
    deleted: Literal[True]


class Rotation(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    overlap: float = Field(
        DEFAULT_OVERLAP, ge=0, description="Seconds that the old secret stays valid; 0: it ends at once."
    )


class Audit(msgspec.Struct):
    data: list[AuditEntry]


def key_routes(store: StoreAccess) -> APIRouter:
    router = admin_router()
    _add_reading(router, store)
    _add_changing(router, store)
    return router


def _add_reading(router: APIRouter, store: StoreAccess) -> None:
    @router.get("/keys", summary="List all keys, those of the configuration included")
    async def list_keys() -> KeyList:
        return KeyList([*await store.call(lambda stored: stored.managed.list())])

    @router.get("/keys/{key_id:name}", summary="Show one key, by id or name")
    async def get_key(key_id: str) -> ListedKey:
        return await store.call(lambda stored: stored.managed.get(key_id))

    @router.get("/audit", summary="List changes of keys, newest first")
    async def audit(
        key: Annotated[
            str | None, Query(pattern=NO_NUL, description="Only this key: its id, or its present or a former name.")
        ] = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        before: Annotated[int | None, Query(ge=0, le=MAX_INTEGER, description="Only before this revision.")] = None,
    ) -> Audit:
        return Audit(await store.call(lambda stored: stored.keys.audit(key=key, limit=limit, before=before)))


def _add_changing(router: APIRouter, store: StoreAccess) -> None:
    @router.post("/keys", summary="Create a key", status_code=201)
    async def create(body: NewKey, request: Request, response: Response) -> KeyWithSecret:
        fields = _fields(body)
        key, secret = await store.call(lambda stored: stored.managed.create(fields, _actor(request)))
        return _with_secret(key, secret, response)

    @router.post("/keys/{key_id:name}/rotate", summary="Give a key a new secret")
    async def rotate(key_id: str, request: Request, response: Response, body: Rotation | None = None) -> KeyWithSecret:
        overlap = (body or Rotation()).overlap
        key, secret = await store.call(lambda stored: stored.managed.rotate(key_id, overlap, _actor(request)))
        return _with_secret(key, secret, response)

    @router.post("/keys/{key_id:name}/revoke", summary="Revoke a key for good; its record stays")
    async def revoke(key_id: str, request: Request) -> ListedKey:
        return await store.call(lambda stored: stored.managed.revoke(key_id, _actor(request)))

    @router.patch("/keys/{key_id:name}", summary="Change a key")
    async def update(key_id: str, body: KeyChanges, request: Request) -> ListedKey:
        fields = _fields(body)
        return await store.call(lambda stored: stored.managed.update(key_id, fields, _actor(request)))

    @router.delete("/keys/{key_id:name}", summary="Delete a key; usage and audit keep its name")
    async def delete(key_id: str, request: Request) -> DeletedKey:
        key = await store.call(lambda stored: stored.managed.delete(key_id, _actor(request)))
        return DeletedKey(key.id, key.name, deleted=True)


def _fields(body: KeyChanges) -> KeyFields:
    fields: dict[str, Any] = {name: getattr(body, name) for name in body.model_fields_set}
    if isinstance(body.expires_at, str):
        try:
            fields["expires_at"] = parse_end(body.expires_at, time.time())
        except ValueError as error:
            raise InvalidRequest(f"Invalid 'expires_at': {error}", param="expires_at") from error
    return KeyFields(**fields)


def _actor(request: Request) -> Actor:
    key = key_of(request)
    return Actor(key.name, key.key_id, record_of(request.scope).request_id)


def _with_secret(key: ListedKey, secret: str, response: Response) -> KeyWithSecret:
    response.headers["cache-control"] = "no-store"
    return KeyWithSecret(**msgspec.structs.asdict(key), secret=secret)

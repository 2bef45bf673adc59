"""The admin API's router: prefix, tag and permission of all its routes."""

from __future__ import annotations

from fastapi import Depends

from llm_api_server.errors import PermissionDenied
from llm_api_server.gateway.routes.public import KeyDependency
from llm_api_server.gateway.routes.struct_router import StructRouter


def admin_router() -> StructRouter:
    return StructRouter(prefix="/admin/api", tags=["admin"], dependencies=[Depends(_require_admin)])


def _require_admin(key: KeyDependency) -> None:
    if not key.may("admin"):
        raise PermissionDenied("Your key has no permission for the admin API ('admin').")

"""Router of the admin API: prefix, tag and permission of its routes, and names with slashes in their paths."""

from __future__ import annotations

from fastapi import Depends
from starlette.convertors import Convertor, register_url_convertor

from llm_api_server.errors import PermissionDenied
from llm_api_server.gateway.routes.public import KeyDependency
from llm_api_server.gateway.routes.struct_router import StructRouter


class _NameConvertor(Convertor[str]):
    """`{...:name}` in a path: a name that may contain slashes, up to a command such as `/load`.

    A name that is a command, or ends like one, is read as the command, whatever the method.
    """

    regex = r"(?!pull$)(?:(?!/(?:explain|load|pin|revoke|rotate|unload|unpin)$).)+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


def admin_router() -> StructRouter:
    register_url_convertor("name", _NameConvertor())
    return StructRouter(prefix="/admin/api", tags=["admin"], dependencies=[Depends(_require_admin)])


def _require_admin(key: KeyDependency) -> None:
    if not key.may("admin"):
        raise PermissionDenied("Your key has no permission for the admin API; give it the permission 'admin'.")
